//! What models need of a pool, and the product does not.

use super::*;

impl<B> SegmentPoolBuilder<B> {
    /// How long a late sender is waited for.
    pub(crate) fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }
}
