#!/usr/bin/env bash
# Checks docs/protocol.pml, docs/loans.pml and docs/signals.pml in every interleaving, with and without
# time-outs, crashes, and connections that end; then that the check can fail: each seeded fault must be
# found.
# Needs spin and a C compiler.
#
#   ci/model.sh           all three
#   ci/model.sh loans     docs/loans.pml only; `transfers`, `signals`: likewise
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
transfers=$PWD/docs/protocol.pml loans=$PWD/docs/loans.pml signals=$PWD/docs/signals.pml
only=${1:-}
wants() { [ "${only:-$1}" = "$1" ]; }
optimised=-O2

# check MODEL FLAGS…: leaves spin's report in $dir/report; fails if the check itself cannot be run.
check() {
    cp "$1" "$dir/model.pml"; shift
    (cd "$dir" && spin "$@" -a model.pml && cc "$optimised" -w -DVECTORSZ=2048 -DCOLLAPSE -DSAFETY -o pan pan.c &&
        ./pan -m100000) >"$dir/report" 2>&1
    grep -q 'errors: ' "$dir/report" || { cat "$dir/report"; echo "the model does not run"; exit 1; }
}

# sound MODEL FLAGS…: the model holds in each of these settings.
sound() {
    local model=$1 flags; shift
    for flags in "$@"; do
        # shellcheck disable=SC2086
        check "$model" $flags
        grep -q 'errors: 0' "$dir/report" || { cat "$dir/report"; echo "fails with: $flags"; exit 1; }
        echo "sound: $flags:$(grep 'states, stored' "$dir/report" | tr -s ' ')"
    done
}

! wants transfers || sound "$transfers" "-DGENERATIONS=3" "-DSTEADFAST" "-DTIMEOUTS" "-DCRASHES" \
    "-DTIMEOUTS -DCRASHES" "-DHANGUPS" "-DHANGUPS -DTIMEOUTS" "-DHANGUPS -DCRASHES" \
    "-DHANGUPS -DAPART" "-DORPHANS" "-DORPHANS -DSTEADFAST"
! wants loans || sound "$loans" "-DASKS=3" "-DASKS=2 -DBUDGET=2" "-DASKS=2 -DLOSSES" "-DASKS=2 -DHOLDS" \
    "-DASKS=2 -DLOSSES -DHOLDS -DBUDGET=2" "-DORPHANS" "-DCRASHES"
! wants signals || sound "$signals" "" "-DPOSTERS=2" "-DPOSTS=2" "-DOTHERS -DREADERS" "-DENDS" "-DHANGUPS"

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
transfers() {
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
}
loans() {
seeded "a loan named before it is introduced" "" \
    '/^proctype Worker/,/^}/s/^                :: atomic { nfull(to_client\[s\])/                :: answer[t].loan = l; answer[t].status = Lent; atomic { nfull(to_client[s])/'
seeded "an account that is free while a loan is introduced" "" \
    's/^                :: atomic { nfull(to_client\[s\]) -> to_client\[s\] ! l, content(s, l) };$/                :: lent[of(s, l)] = true; account_locked[s] = false; to_client[s] ! l, content(s, l);/; s/^                    lent\[of(s, l)\] = true; count\[s\]++; known = true$/                    count[s]++; known = true/'
seeded "a loan entered that was not introduced" "" \
    's/^                :: skip         .*/                :: lent[of(s, l)] = true; count[s]++/'
seeded "an introduction that waits for room" "-DBUDGET=2" \
    's/:: atomic { nfull(to_client\[s\]) -> to_client\[s\] ! l, content(s, l) };/:: to_client[s] ! l, content(s, l);/; s/^                :: skip         .*//'
seeded "an account that is overdrawn by one" "" \
    's/count\[s\] < BUDGET ->/count[s] <= BUDGET ->/; s/count\[s\] >= BUDGET ->/count[s] > BUDGET ->/'
seeded "a loan that is returned and not struck out" "" \
    's/lent\[of(s, l)\] = false; count\[s\]--;//'
seeded "a loan let go of in silence" "" \
    '/^inline evict/,/^}/s/ untold\[of(s, 0)\] = true//'
seeded "a loan returned twice" "" \
    's/^            untold\[of(s, i)\] = false;$//; s/^            to_server\[s\] ! i;$/            untold[of(s, i)] = let_go[of(s, i)] \&\& !untold[of(s, 1 - i)]; to_server[s] ! i;/'
seeded "a loan returned before it is let go of" "$two" \
    's/^            kept\[of(s, 0)\] = 0; let_go\[of(s, 0)\] = true; untold\[of(s, 0)\] = true/            let_go[of(s, 0)] = true; nfull(to_server[s]) -> to_server[s] ! 0; running = running/; s/^    evict(s);$/    evict(s); kept[of(s, 0)] = 0;/'
seeded "a descriptor that is lost and not returned" "-DLOSSES" \
    's/let_go\[of(s, n)\] = true; untold\[of(s, n)\] = true; n = 0/let_go[of(s, n)] = true; n = 0/'
seeded "a connection that two threads read at once" "" \
    's/atomic { !reading\[s\] -> reading\[s\] = true }/skip/'
seeded "a request asked again that still takes loans" "$two" \
    's/^                takes = false;$//'
seeded "one table for all servers" "-DCRASHES" \
    's/c = kept\[of(s, l)\];/c = (kept[of(0, l)] != 0 -> kept[of(0, l)] : kept[of(s, l)]);/'
seeded "an introduction that nobody looked for, left unread" "" \
    's/^    :: nempty(to_client\[s\]) -> read_one(s, n, c, got)$/    :: false -> skip/; s/^    :: empty(to_client\[s\]) ->$/    :: true ->/'
}
signals() {
seeded "a question outside the lock" "" \
    's/-> has_asked = true; ask()/-> has_asked = true; release(); ask(); acquire()/'
seeded "a task that does not try once more" "" \
    's/:: is_settled(t) || severed -> goto try_over/:: false -> goto try_over/'
seeded "a look that does not ask anew" "" \
    's/:: has_asked -> ask(); wake_ready(i)/:: has_asked -> wake_ready(i)/'
seeded "a look that asks when it has looked" "" \
    's/:: has_asked -> ask(); wake_ready(i)/:: has_asked -> ask()/'
seeded "a later question lowered" "" \
    's/:: word == n -> word = 0/:: true -> word = 0/'
seeded "a question with the same number" "" \
    's/^    word = asked$/    word = 1/'
seeded "a question that is never lowered" "-DPOSTS=2" \
    's/:: word == n -> word = 0/:: false -> skip/'
seeded "a question read before the post" "" \
    's/-> permits\[t\]++; signal(n)/-> n = word; permits[t]++; signal(n)/; s/^    n = word;$//'
seeded "a message that is read, and no look" "-DOTHERS -DREADERS" \
    '/^proctype Reader/,/^}/s/line ? _ -> look(i)/line ? _ -> skip/'
seeded "poison that signals nobody" "-DENDS" \
    's/poison\[t\] = true; signal(n)/poison[t] = true/'
seeded "a severed link that wakes no task" "-DHANGUPS" \
    '/^proctype Watcher/,/^}/s/woken\[i\] = true/skip/'
}
two="-DASKS=2"
model=$transfers; ! wants transfers || transfers
model=$loans; ! wants loans || loans
model=$signals; ! wants signals || signals
echo "$faults faults found"
