//! When a spin is tried.

use super::*;

/// How often a spinner tries while no permit comes.
fn tries(spinner: &mut Spinner, can_pay: bool) -> u32 {
    let mut tries = 0;
    let found = spinner.spin(can_pay, Duration::from_micros(20), || {
        tries += 1;
        None::<()>
    });
    assert!(found.is_none());
    tries
}

#[test]
fn a_spin_in_vain_is_not_repeated_until_it_is_worth_another_try() {
    let mut spinner = Spinner::new();
    assert!(tries(&mut spinner, true) > ROUNDS);
    for _ in 0..PROBE {
        assert_eq!(tries(&mut spinner, true), 1);
    }
    assert!(tries(&mut spinner, true) > ROUNDS, "a probe");
    assert_eq!(tries(&mut spinner, true), 1);
}

#[test]
fn answers_in_time_earn_credit_for_some_that_are_not() {
    let mut spinner = Spinner::new();
    for _ in 0..20 {
        let mut left = 3;
        let answer = spinner.spin(true, BUDGET, || {
            left -= 1;
            (left == 0).then_some(7)
        });
        assert_eq!(answer, Some(7));
    }
    let spins = (0..20).take_while(|_| tries(&mut spinner, true) > 1).count();
    assert_eq!(spins, usize::from(MOST_CREDIT / PENALTY));
    spinner.slept(BUDGET);
    assert_eq!(tries(&mut spinner, true), 1, "that was no short sleep");
    spinner.slept(Duration::ZERO);
    assert!(tries(&mut spinner, true) > ROUNDS, "a short sleep would have been a good spin");
    assert_eq!(tries(&mut spinner, true), 1);
}

#[test]
fn nobody_spins_where_it_cannot_pay() {
    let mut spinner = Spinner::new();
    assert_eq!(tries(&mut spinner, false), 1);
    static ALL: AtomicUsize = AtomicUsize::new(0);
    let first = Presence::among(&ALL);
    assert!(!first.is_crowded());
    let others: Vec<_> = (0..4096).map(|_| Presence::among(&ALL)).collect();
    assert!(first.is_crowded());
    drop(others);
    assert!(!first.is_crowded());
}
