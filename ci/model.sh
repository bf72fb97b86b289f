#!/usr/bin/env bash
# Checks docs/protocol.pml in every interleaving, with and without time-outs, crashes, and
# connections that end; then that the check can fail: each seeded fault must be found. Needs spin
# and a C compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
model=$PWD/docs/protocol.pml
optimised=-O2

# check MODEL FLAGS…: leaves spin's report in $dir/report; fails if the check itself cannot be run.
check() {
    cp "$1" "$dir/model.pml"; shift
    (cd "$dir" && spin "$@" -a model.pml && cc "$optimised" -w -DCOLLAPSE -DSAFETY -o pan pan.c &&
        ./pan -m100000) >"$dir/report" 2>&1
    grep -q 'errors: ' "$dir/report" || { cat "$dir/report"; echo "the model does not run"; exit 1; }
}

for flags in "-DGENERATIONS=3" "-DSTEADFAST" "-DTIMEOUTS" "-DCRASHES" "-DTIMEOUTS -DCRASHES" \
    "-DHANGUPS" "-DHANGUPS -DTIMEOUTS" "-DHANGUPS -DCRASHES" "-DHANGUPS -DAPART" \
    "-DORPHANS" "-DORPHANS -DSTEADFAST"; do
    # shellcheck disable=SC2086
    check "$model" $flags
    grep -q 'errors: 0' "$dir/report" || { cat "$dir/report"; echo "fails with: $flags"; exit 1; }
    echo "sound: $flags:$(grep 'states, stored' "$dir/report" | tr -s ' ')"
done

# seeded NAME FLAGS SED-SCRIPT: a model with this fault must fail.
faults=0
optimised=-O0 # what is wrong is soon found: compiling would take longer
seeded() {
    sed "$3" "$model" >"$dir/seeded.pml"
    cmp -s "$model" "$dir/seeded.pml" && { echo "the fault '$1' changes nothing"; exit 1; }
    # shellcheck disable=SC2086
    check "$dir/seeded.pml" $2
    grep -q 'errors: 1' "$dir/report" || { echo "not found: $1"; exit 1; }
    echo "found: $1 ($(sed -n 's/^pan:1: \(.*\) (at depth.*/\1/p' "$dir/report"))"
    faults=$((faults + 1))
}
seeded "a segment reused while its sender is on it" "" \
    's/:: atomic { off(segment\[s\].phase) -> segment\[s\].phase = Idle; break }/:: atomic { segment[s].phase = Idle; break }/'
seeded "a segment not replaced when the grace is over" "-DTIMEOUTS" \
    's/segment\[s\].retired = true; fresh++; s = fresh; segment\[s\].phase = Idle; break/segment[s].phase = Idle; break/'
seeded "a hang-up taken for a death" "-DHANGUPS" \
    's/receivers_link_severed\[link\] && dead\[link\] &&/receivers_link_severed[link] \&\&/'
seeded "a late request accepted whatever its generation" "-DTIMEOUTS" \
    's/segment\[seg\].generation == gen && segment/segment/'
seeded "a late request accepted by a server whose successor was asked" "-DHANGUPS" \
    's/segment\[seg\].generation == gen && segment/segment/'
seeded "an accept in two steps" "-DTIMEOUTS" \
    's/^            advance(s, g, Offered, Accepted, won);/won = (segment[s].generation == g \&\& segment[s].phase == Offered) }; atomic { segment[s].phase = (won -> Accepted : segment[s].phase);/'
seeded "a request asked again although a sender has accepted it" "-DHANGUPS" \
    's/^        :: severed && won ->/        :: severed ->/'
seeded "the final phase entered before the last permit is added" "" \
    's/^        atomic { assert(ours(s, g)); segment\[s\].filled++; assert(segment\[s\].filled <= SLOTS);$/if :: sent == CHUNKS -> segment[s].phase = Finished; atomic { assert(ours(s, g)); segment[s].filled++ }; cursor = 0; sent = 0; goto end_take :: else -> skip fi;&/'
seeded "a receiver's watcher that poisons nothing" "-DCRASHES" \
    's/^                segment\[enrolled_segment\].filled_poison = true$/                skip/'
seeded "a sender's watcher that poisons nothing" "-DORPHANS -DSTEADFAST" \
    's/^                    segment\[covered_segment\[w\]\].free_poison = true$/                    skip/'
seeded "a link that was severed before the transfer is registered" "-DHANGUPS" \
    '/^inline send/,/^}/s/segment\[s\].filled_poison = true/skip/'
seeded "a link that was severed before the sender is covered" "-DORPHANS -DSTEADFAST" \
    's/:: senders_link_severed\[server_of(me)\] -> segment\[s\].free_poison = true/:: senders_link_severed[server_of(me)] -> skip/'
seeded "a transfer that stays registered after its end" "-DHANGUPS" \
    's/^            enrolled = false; .*/            skip/'
seeded "a request registered after its transfer's end" "-DHANGUPS -DAPART" \
    's/^        :: g > over ->$/        :: true ->/'
seeded "a sender that stays covered after its last write" "-DHANGUPS" \
    's/^        covered\[me\] = false;$//'
seeded "a request that is dropped without a word" "-DAPART" \
    's/segment\[s\].phase = Withdrawn; segment\[s\].filled_poison = true/skip/'
seeded "a cancellation that does not wake the sender" "-DSTEADFAST" \
    's/^                segment\[s\].free_poison = true$/                skip/'
seeded "an abort that does not wake the receiver" "" \
    's/segment\[s\].filled_poison = true };$/skip };/'
echo "$faults faults found"
