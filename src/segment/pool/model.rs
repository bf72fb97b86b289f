//! Functions of a pool for models only.

use super::*;

impl<B> SegmentPoolBuilder<B> {
    /// How long a late sender is waited for.
    pub(crate) fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }
}
