#!/usr/bin/env bash
# Checks docs/protocol.pml in every interleaving, with and without time-outs and crashes; then that
# the check can fail: each seeded fault must be found. Needs spin and a C compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
model=$PWD/docs/protocol.pml

# check MODEL FLAGS…: leaves spin's report in $dir/report; fails if the check itself cannot be run.
check() {
    cp "$1" "$dir/model.pml"; shift
    (cd "$dir" && spin "$@" -a model.pml && cc -O2 -DCOLLAPSE -DSAFETY -o pan pan.c && ./pan -m100000) \
        >"$dir/report" 2>&1
    grep -q 'errors: ' "$dir/report" || { cat "$dir/report"; echo "the model does not run"; exit 1; }
}

for flags in "-DGENERATIONS=3" "-DSTEADFAST" "-DTIMEOUTS" "-DCRASHES" "-DTIMEOUTS -DCRASHES"; do
    # shellcheck disable=SC2086
    check "$model" $flags
    grep -q 'errors: 0' "$dir/report" || { cat "$dir/report"; echo "fails with: $flags"; exit 1; }
    echo "sound: $flags:$(grep 'states, stored' "$dir/report" | tr -s ' ')"
done

# seeded NAME FLAGS SED-SCRIPT: a model with this fault must fail.
seeded() {
    sed "$3" "$model" >"$dir/seeded.pml"
    cmp -s "$model" "$dir/seeded.pml" && { echo "the fault '$1' changes nothing"; exit 1; }
    # shellcheck disable=SC2086
    check "$dir/seeded.pml" $2
    grep -q 'errors: 1' "$dir/report" || { echo "not found: $1"; exit 1; }
    echo "found: $1"
}
seeded "a segment reused while its sender is on it" "" \
    's/:: atomic { off(segment\[s\].phase) -> segment\[s\].phase = Idle; break }/:: atomic { segment[s].phase = Idle; break }/'
seeded "a segment not replaced when the grace is over" "-DTIMEOUTS" \
    's/segment\[s\].retired = true; fresh++; s = fresh; segment\[s\].phase = Idle; break/segment[s].phase = Idle; break/'
seeded "a late request accepted whatever its generation" "-DTIMEOUTS" \
    's/alive && segment\[seg\].generation == gen && segment/alive \&\& segment/'
seeded "the final phase entered before the last permit is added" "" \
    's/:: atomic { !dead -> assert(ours(s, g)); segment\[s\].filled++; assert(segment\[s\].filled <= SLOTS) }/:: atomic { !dead -> if :: sent == CHUNKS -> segment[s].phase = Finished :: else -> skip fi }; atomic { !dead -> assert(ours(s, g)); segment[s].filled++ }; if :: sent == CHUNKS -> goto end_take :: else -> skip fi/'
seeded "a death that poisons nothing" "-DCRASHES" \
    's/^                segment\[leased_segment\].filled_poison = true;$/                skip;/'
seeded "a cancellation that does not wake the sender" "-DSTEADFAST" \
    's/^            segment\[s\].free_poison = true$/            skip/'
seeded "an abort that does not wake the receiver" "" \
    's/segment\[s\].filled_poison = true }$/skip }/'
