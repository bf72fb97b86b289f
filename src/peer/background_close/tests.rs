//! Too many closings under way are reported.

use super::*;

#[test]
fn so_many_closings_and_no_more_let_others_in() {
    // Other tests of this process close some, too: hence the wide margin.
    assert!(!is_behind());
    let closings: Vec<_> = (0..MOST).map(|_| Counted::among(&UNDER_WAY)).collect();
    assert!(is_behind());
    drop(closings);
}
