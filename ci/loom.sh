#!/usr/bin/env bash
# The semaphore, the transfer, the ring and loans under loom: every interleaving and reordering with
# up to 2 preemptions; then that the check can fail: each fault of one line must be found.
#
#   ci/loom.sh            2 preemptions, and the faults (20 minutes, two cores)
#   ci/loom.sh third      2 preemptions, and a third of the faults: another one with each commit (8 minutes)
#   ci/loom.sh long       3 preemptions, and the faults (four minutes more)
#   ci/loom.sh faults     the faults only; with a word behind it, those that have it in their names
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-}
only=${2:-}
[ "$mode" = long ] && LOOM_MAX_PREEMPTIONS=3
export LOOM_MAX_PREEMPTIONS=${LOOM_MAX_PREEMPTIONS:-2}
export RUSTFLAGS="--cfg loom" RUSTUP_DIST_SERVER=http://127.0.0.1:9 RUSTUP_AUTO_INSTALL=0
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/loom CARGO_INCREMENTAL=1

# A copy, to be spoilt, without the programs' packages, nor what only the other tests and the benches
# need: loom would compile that, too.
copy=$CARGO_TARGET_DIR/copy
mkdir -p "$copy"
fresh() { rm -rf "$copy/src"; cp -r Cargo.lock README.md src "$copy"; }
fresh
sed -E '/^\[\[(bench|example)\]\]/,/^$/d; /^(default-members|members|shmferry-test-support) = /d' \
    Cargo.toml | sed 's/^opt-level = 1$/opt-level = 0\ndebug = false/' >"$copy/Cargo.toml"
printf '\n[profile.dev.package."*"]\nopt-level = 3\n' >>"$copy/Cargo.toml"

loom() { (cd "$copy" && cargo test --offline --lib -- "$@"); }

if [ "$mode" != faults ]; then
    loom model:: --nocapture --test-threads 1 2>&1 | tee "$CARGO_TARGET_DIR/log"
fi

# seeded NAME FILE TEST SED-SCRIPT: with this fault in src/FILE, the models named TEST must fail. A
# deadlock is a failure, and so is a model that never ends.
export LOOM_MAX_PREEMPTIONS=2
found=0
number=0
share=$(($(git rev-list --count HEAD 2>/dev/null || echo 0) % 3))
# Some want one preemption more: bound=3 seeded ….
seeded() {
    local LOOM_MAX_PREEMPTIONS=${bound:-2}
    case $1 in *"$only"*) ;; *) return ;; esac
    number=$((number + 1))
    if [ "$mode" = third ] && [ $((number % 3)) != "$share" ]; then return; fi
    fresh
    sed -E "$4" "src/$2" >"$copy/src/$2"
    cmp -s "src/$2" "$copy/src/$2" && { echo "changes nothing: $1"; missed=1; return; }
    if (cd "$copy" && cargo test --offline --lib --no-run) >"$copy/log" 2>&1; then
        loom "$3" >"$copy/log" 2>&1 && { echo "not found: $1"; missed=1; return; }
        grep -q 'test result: FAILED\|panicked\|SIGABRT' "$copy/log" || { cat "$copy/log"; exit 1; }
        echo "found: $1"; found=$((found + 1))
    else
        cat "$copy/log"; echo "does not compile: $1"; missed=1
    fi
}
missed=0

s=sync/semaphore.rs
seeded "a permit added without Release"        $s semaphore::model 's/self.word.fetch_add\(1, Release\)/self.word.fetch_add(1, Relaxed)/'
seeded "a permit taken without Acquire"        $s semaphore::model 's/let mut seen = self.word.load\(Acquire\)/let mut seen = self.word.load(Relaxed)/; s/\(seen, seen - 1, Acquire, Acquire\)/(seen, seen - 1, Relaxed, Relaxed)/'
seeded "poison set without Release"            $s semaphore::model 's/self.word.fetch_or\(POISON, Release\)/self.word.fetch_or(POISON, Relaxed)/'
seeded "poison seen without Acquire"           $s semaphore::model 's/let mut seen = self.word.load\(Acquire\)/let mut seen = self.word.load(Relaxed)/'
seeded "no fence before the sleep"             $s semaphore::model '/let slept/,/let slept/!s/^            fence\(SeqCst\); \/\/ pair 2$//'
seeded "no fence before the wake"              $s semaphore::model 's/^        fence\(SeqCst\); \/\/ pair 2$//'
seeded "a sleeper that does not say so"        $s semaphore::model 's/self.sleepers.fetch_add\(1, Relaxed\);//; s/self.sleepers.fetch_sub\(1, Relaxed\);//'
seeded "a post that does not wake"             sync/semaphore/for_tests.rs semaphore::model '/fn post/,/^    }/s/self.wake\(\);//'
seeded "nothing that wakes"                    $s semaphore::model 's/self.parker.unpark_all\(&self.word\);$//'

# The same, through a whole transfer.
m=protocol::model
seeded "transfer: a permit added without Release"   $s $m::two_slots 's/self.word.fetch_add\(1, Release\)/self.word.fetch_add(1, Relaxed)/'
seeded "transfer: a permit taken without Acquire"   $s $m::two_slots 's/\(seen, seen - 1, Acquire, Acquire\)/(seen, seen - 1, Relaxed, Relaxed)/; s/let mut seen = self.word.load\(Acquire\)/let mut seen = self.word.load(Relaxed)/'
seeded "transfer: no fence before the sleep"        $s $m '/let slept/,/let slept/!s/^            fence\(SeqCst\); \/\/ pair 2$//'
seeded "transfer: no fence before the wake"         $s $m 's/^        fence\(SeqCst\); \/\/ pair 2$//'
seeded "a cancellation published without Release"   $s $m::a_receiver 's/self.word.fetch_or\(POISON, Release\)/self.word.fetch_or(POISON, Relaxed)/'
seeded "a cancellation seen without Acquire"        $s $m::a_receiver 's/self.word.load\(Acquire\) & POISON/self.word.load(Relaxed) \& POISON/'
seeded "poison told before permits are drained"     $s $m::an_abort 's/if seen & !POISON == 0 \{/if seen \& POISON != 0 || seen == 0 {/; s/seen == POISON;/seen != 0;/'

h=segment/header.rs
seeded "a turn taken without Acquire"               $h $m 's/compare_exchange\(from, to, AcqRel, Acquire\)/compare_exchange(from, to, Release, Relaxed)/; s/self.0.load\(Acquire\)/self.0.load(Relaxed)/'
seeded "a turn given without Release"               $h $m 's/compare_exchange\(from, to, AcqRel, Acquire\)/compare_exchange(from, to, Acquire, Acquire)/'
seeded "a phase of whatever generation"             $h $m 's/Ok\(\(now, phase\)\) if now == generation/Ok((_, phase))/; s/^    pub\(crate\) fn advance\(.*$/&let generation = self.0.load(Relaxed) >> 8;/'
seeded "a sender counted as off while it accepts"   $h $m 's/matches!\(self, Idle \|/matches!(self, Idle | Accepted |/'
seeded "a sender counted as off while it sends"     $h $m 's/matches!\(self, Idle \|/matches!(self, Idle | Announced |/'
seeded "a withdrawn request counted as held"        $h $m 's/Aborted \| Withdrawn\)/Aborted)/'

t=protocol/sender.rs
c=protocol/sender/slot.rs
w=segment/writer.rs
seeded "a late request accepted whatever its generation" $w $m 's/^        segment.header\(\).turn.advance\(generation, Phase::Offered/let generation = segment.header().turn.load().ok()?.0; &/'
seeded "an accept that takes no turn" $w $m 's/^        segment.header\(\).turn.advance\(generation, Phase::Offered, Phase::Accepted\).ok\(\)\?;$/if segment.header().turn.phase_of(generation) != Some(Phase::Offered) { return None; }/'
seeded "the last turn before the last permit"       $t $m '/fn end/,/^    }/{s/^        header.filled.add\(permit\);$//; s/^        header.filled.wake\(\);.*/header.filled.add(permit); header.filled.wake();/}'
seeded "an end that does not wake"                  $t $m '/fn end/,/^    }/s/^        header.filled.wake\(\);.*//'
seeded "an end that leaves no turn" $w $m '/fn leave/,/^    }/s/^        \(self.segment.header\(\).turn.advance/if phase != Phase::Aborted { return (Ok(()), link); } &/'
seeded "out of reach of the link after the last turn" $w $m '/fn leave/,/^    }/{s/^        drop\(self.registration\);$//; s/^        \((self.segment.header\(\).turn.advance.*), link\)$/let left = \1; drop(self.registration); (left, link)/}'
seeded "the last turn before the poison"            $t $m '/fn abort/,/^    }/{s/^        header.filled.set_poison\(\);$//; s/^        header.filled.wake\(\);.*/header.filled.poison();/}'
seeded "an abort that does not wake"                $t $m '/fn abort/,/^    }/s/^        header.filled.wake\(\);.*//'
seeded "an abort that poisons nothing"              $t $m '/fn abort/,/^    }/s/^        header.filled.set_poison\(\);$//'
seeded "an abort that leaves no turn" $w $m '/fn leave/,/^    }/s/^        \(self.segment.header\(\).turn.advance/if phase == Phase::Aborted { return (Ok(()), link); } &/'
seeded "a chunk that wakes nobody" $t $m '/fn hand_over/,/^    }/s/^            header.filled.wake\(\);//'
seeded "a wake-up put off with nothing left to fill" $t $m 's/&& self.waiter.can_put_off\(.*/\&\& slots > 0/'
seeded "a chunk word written after its permit" $c $m 's/^        header.chunks\[self.state.cursor as usize\].store\(chunk\);$/let slot = self.state.cursor as usize;/; s/^            return self.side.end\(Phase::Finished, permit\);/let end = self.side.end(Phase::Finished, permit); self.side.segment.header().chunks[slot].store(chunk); return end;/; s/^        self.side.hand_over\(permit, self.state.in_batches\);/&self.side.segment.header().chunks[slot].store(chunk);/'
seeded "a slot written before it is free" $c $m 's/^            self.state.permit = Some\(match deadline \{$/self.side.writer()?.slots().write_slot(self.state.cursor, 0, \&[0]);&/'
seeded "a cover that overlooks a severed link"      peer/link.rs $m::a_severed 's/^            subject.poison\(\);$//'
seeded "a severed link that poisons nothing"        peer/link.rs $m::a_severed '/fn sever/,/^    \}/s/^        state.registered.values\(\).*$//'
seeded "a sender that has itself covered by no link" $w $m 's/^        registration.cover\(.*//'
seeded "covered before it has accepted" $w $m::a_link_severed_while_its_sender_leaves '/fn accept/,/^    \}/s/^        segment.header\(\).turn.advance/registration.cover(Arc::clone(segment) as _); &/'
seeded "in reach of the link after an abort" $w $m::a_link_severed_while_its_sender_aborts '/fn leave/,/^    \}/{s/^        drop\(self.registration\);$//; s/^        \((self.segment.header\(\).turn.advance.*), link\)$/let left = \1; drop(self.registration); (left, link)/}'
seeded "a request dropped by its sender, not aborted" $t $m::an_abort_before '/fn abort/,/^    \}/s/^            let _ = self.take_up\(\);.*//'
seeded "an abort of what was never taken up" $t $m::a_late_accept '/fn abort/,/^    \}/s/^        let Some\(writer\) = self.stand.leave.*/self.header().filled.set_poison(); &/'
seeded "a segment poisoned after its registration ended" peer/link.rs $m::a_request_sent_after '/fn sever/,/^    \}/{s/^        state.registered.values\(\).*/let late: Vec<_> = state.registered.values().flatten().cloned().collect();/; s/^        wakers.into_iter/late.iter().for_each(|subject| subject.poison()); &/}'
seeded "a registration that never ends"               peer/link.rs $m::a_link_severed_late 's/^        state.registered.remove\(&self.number\);//'
e=segment.rs
seeded "a receiver's link that poisons the sender's wait" $e $m::a_severed 's/self.header\(\).filled.poison\(\);/self.header().free.poison();/'
seeded "a receiver's link that poisons both waits"  $e $m::a_sender_is_not_stopped 's/self.header\(\).filled.poison\(\);/&self.header().free.poison();/'
seeded "a sender's link that poisons the receiver's wait" $e $m::a_severed 's/self.header\(\).free.poison\(\);/self.header().filled.poison();/'
seeded "a sender's link that poisons both waits"    $e $m::a_sender_whose_link 's/self.header\(\).free.poison\(\);/&self.header().filled.poison();/'

seeded "a segment claimed before its turn is taken" $w $m::what_a '/fn accept/,/^    }/{s/^        segment.header\(\).turn.advance.*/if segment.is_claimed.swap(true, Acquire) { return None; } if segment.header().turn.advance(generation, Phase::Offered, Phase::Accepted).is_err() { segment.is_claimed.store(false, Release); return None; }/; s/^        if segment.is_claimed.swap\(true, Acquire\) \{$/if false {/}'
seeded "a claim that outlasts the transfer" $w $m::the_next_generation 's/^        self.segment.is_claimed.store\(false, Release\);$//'
seeded "a claim that outlasts an abort" $w $m::what_an_aborting 's/^        self.segment.is_claimed.store\(false, Release\);$//'
bound=3 seeded "a claim given back after the last turn" $w $m::the_next_generation '/fn leave/,/^    }/{s/^        self.segment.is_claimed.store\(false, Release\);$//; s/^        \((self.segment.header\(\).turn.advance.*), link\)$/let left = \1; self.segment.is_claimed.store(false, Release); (left, link)/}'

r=protocol/receiver.rs
k=protocol/receiver/chunk.rs
seeded "a cancellation that does not wake"          $r $m 's/^            header.free.poison\(\);$/header.free.set_poison();/'
seeded "a receiver that goes without a word"        $r $m 's/^            header.free.poison\(\);$//'
seeded "no withdrawal"                              $r $m '/fn break_off/,/^    }/s/= header.turn.advance\(self.generation, Phase::Offered, Phase::Withdrawn\);$/= Err::<(), ()>(());/'
seeded "a withdrawal after accepting was left open" $r $m '/fn break_off/,/^    }/s/Some\(Phase::Accepted \| Phase::Announced\)/Some(Phase::Announced)/'
seeded "a link that ends after the segment is given back" $r $m::a_link_severed_while_its_receiver '/fn end\(&mut self\)/,/^    \}/s/self.offer.end\(\)/self.offer.link()/; s/give_back\(ended\);/give_back(ended); self.offer.end();/'
seeded "permits left over from the last transfer"   $r $m 's/^    header.filled.reset\(0\);$//'
seeded "free slots left over from the last transfer" $r $m 's/^    header.free.reset\(.*//'
seeded "a cancellation left over from the last transfer" $r $m 's/^    header.receiver.cancelled.store\(0, Relaxed\);$//'
seeded "reset after the offer"                      $r $m 's/^    header.filled.reset\(0\);$//; s/^    header.free.reset\(.*//; s/^    header.turn.open_next\(generation\)$/let next = header.turn.open_next(generation); header.filled.reset(0); header.free.reset(segment.geometry().slot_count()); next/'
seeded "a slot that goes back unannounced"          $k $m 's/^                header.free.wake\(\);$//'
seeded "a slot read after it went back"             $k $m 's/^            header.free.add\(permit\);$/&self.side.guard.segment.readable().read_slot((self.state.cursor + slots - 1) % slots, 0, \&mut [0]);/'

p=segment/pool/shared.rs
d=segment/pool/quarantine.rs
seeded "a segment reclaimed while its sender is on it" $d $m '/fn reclaim/,/^    }/s/Some\(phase\) if phase.is_off\(\)/Some(phase)/'
seeded "a segment leased again, reclaimed or not" $p $m 's/^        if ended.reclaim\(segment\) \{/if ended.reclaim(segment) || true {/; s/\(Some\(pooled\), _\) if pooled.is_sound\(\) =>/(Some(pooled), _) if true =>/; s/if is_alone && first.is_sound\(\)/if is_alone/'
seeded "a quarantined segment leased as it is"        $p $m 's/if (blocking.*settle.*\)\)) \{/if \1 || true {/'
seeded "a wait for a late sender that nothing ends" $d $m 's/filled.wait\(recheck\)/filled.wait(deadline)/'
seeded "a hang-up taken for a death"                $d $m::a_hang_up 's/if link.wait_dead\((.*)\) \{/if link.wait_dead(\1) || true {/'
seeded "a death that is not looked for"             $d $m::a_segment_whose_sender_died 's/if link.wait_dead\((.*)\) \{/if link.wait_dead(\1) \&\& false {/'
seeded "a dead sender's segment leased as it is"    $d $m::a_segment_whose_sender_died 's/&& header.turn.advance\(\*generation, phase, Phase::Idle\).is_ok\(\);/\&\& true;/'
seeded "a dead sender's last step overlooked"       $d $m::a_sender_that_dies 's/&& header.turn.advance\(\*generation, phase, Phase::Idle\).is_ok\(\);/\&\& { let _ = header.turn.advance(*generation, phase, Phase::Idle); true };/'
seeded "a segment that was left, leased as it is"   $d $m::a_segment_is_leased 's/=> return self.ended.reclaim\(.*\),/=> return true,/'
seeded "a grace that is never over"                 $d $m::a_sender_that_stands_still '/fn settle/,/^    \}/s/if deadline.has_passed\(\)/if false/'
seeded "a segment leased when the grace is over"    $d $m::a_segment_whose_sender_lingers '/fn settle/,/^    \}/s/^                return false;/return true;/'
seeded "a segment that cannot be replaced, lost"    $p $m::a_segment_that_cannot '/fn take_slowly\(/,/^    \}/s/^                    self.put_quarantined\(quarantined\);$//'
seeded "what is quarantined beside, given back and leased as it is" $p $m::what_lingers '/fn tidy/,/^    \}/s/if quarantined.settle\(.*\) =>/if quarantined.settle(Deadline::after(Duration::ZERO)) || true =>/; s/\(Some\(pooled\), _\) if pooled.is_sound\(\) =>/(Some(pooled), _) if true =>/; s/if is_alone && first.is_sound\(\)/if is_alone/'

f=protocol/offer.rs
v=protocol/wait.rs
seeded "a dropped request that does not wake"       $f $m 's/^                header.filled.poison\(\);$/header.filled.set_poison();/'
seeded "a dropped request that is not withdrawn"    $f $m 's/if header.turn.advance\(self.generation, Phase::Offered, Phase::Withdrawn\).is_ok\(\)/if header.turn.load().is_err()/'
seeded "a request registered after its transfer is over" $f $m::a_request_sent_after '/fn sent_over/,/^    \}/s/if matches!\(\*state, OfferState::Over\) \{/if false {/'
seeded "an offer that is never over"                $f $m::a_request_sent_after '/fn end\(/,/^    \}/s/let over = .*/let over = \&*lock(\&self.state);/'
seeded "a request withdrawn although it was sent"   $f $m::one_slot '/fn abandon/,/^    \}/s/if let OfferState::Unsent\(waker\) = &mut \*state/let mut nobody = None; let waker = match \&mut *state { OfferState::Unsent(waker) => waker, OfferState::Sent(_) => \&mut nobody, OfferState::Over => return }; /'
seeded "a dropped request that poisons what a sender has" $f $m::a_request_dropped '/fn abandon/,/^    \}/s/Phase::Withdrawn\).is_ok\(\)/Phase::Withdrawn).is_ok() || true/'
seeded "a dropped request that lets go before it poisons" $f $m::a_request_dropped '/fn abandon/,/^    \}/s/if let OfferState::Unsent\(waker\) = &mut \*state/let unsent = match \&mut *state { OfferState::Unsent(waker) => Some(waker.take()), _ => None }; drop(state); if let Some(mut waker) = unsent/; s/^                drop\(state\);.*//'

seeded "a look at the link that loses what was filled"  $v $m::what_was_filled 's/return semaphore.try_wait\(\).map_err\(.*/return Err(Interrupted::Poisoned);/'
seeded "a sleeper that does not look at the link"   $v $m::a_link_that_ended 's/Err\(Interrupted::TimedOut\) if is_severed\(\)/Err(Interrupted::TimedOut) if is_severed() \&\& false/'

n=sync/fair_semaphore.rs
seeded "a place given back that wakes nobody in line" $n $m::two_that 's/^                first.called.notify_one\(\);$//'
seeded "a place given back past the line"           $n $m::two_that 's/match state.queue.pop_front\(\)/match None::<Arc<Waiter>>/'
seeded "a segment counted before it is there"       $p $m::two_that '/fn put_idle/,/^    }/{s/^        lock\(&self.state\).idle.push\(pooled\);$/self.available.leave();/; s/^        self.available.leave\(\);$/lock(\&self.state).idle.push(pooled);/}'
seeded "a segment leased again while its sender is on it" $p $m::a_request_is 's/if blocking.*settle.*\{/if true {/'
seeded "a withdrawal that does not ask the turn word" $r $m::a_request_is '/fn withdraw/,/^    }/s/turn.advance\(.*\).is_ok\(\)/turn.load().is_ok()/'

g=channel/seqpacket/ring.rs
q=seqpacket::model
seeded "an entry posted without Release"            $g $q 's/\[POSTED\].store\(\*posted, Release\)/[POSTED].store(*posted, Relaxed)/'
seeded "an entry read without Acquire"              $g $q '/fn peek/,/^    }/s/\[POSTED\].load\(Acquire\)/[POSTED].load(Relaxed)/; /fn has_entries/,/^    }/s/load\(Acquire\)/load(Relaxed)/'
seeded "an entry let go before it is read"          $g $q '/fn peek/,/^    }/s/^        let generation = /self.ring[TAKEN].store(taken + 1, Release); &/'
seeded "no fence before need_wakeup is read"                  $g $q '/fn follow/,/^    }/s/^        fence\(SeqCst\); .*//'
seeded "no fence after need_wakeup is set"                    $g $q '/fn arm/,/^    }/s/^        fence\(SeqCst\); .*//'
seeded "a need_wakeup that is not set"                  $g $q '/fn arm/,/^    }/s/^        self.ring\[NEED_WAKEUP\].swap\(need_wakeup, Relaxed\);//'
seeded "no look after need_wakeup is set"                     $g $q '/fn arm/,/^    }/s/^        self.has_entries\(\)/false/'
seeded "a new ring without need_wakeup"                  $g $q 's/^        ring\[NEED_WAKEUP\].store\(NEW, Relaxed\);//'
seeded "need_wakeup cleared before the wake-up is sent"            $g $q '/fn follow/,/^    }/s/^            need_wakeup => Posted::MustWake\(need_wakeup\)/need_wakeup => { self.lower(need_wakeup); Posted::MustWake(need_wakeup) }/'
seeded "need_wakeup set to the same number"   $g $q '/fn arm/,/^    }/s/^        let need_wakeup = .*/let need_wakeup = NEW;/; s/self.ring\[NEED_WAKEUP\].swap\(need_wakeup, Relaxed\);/self.ring[NEED_WAKEUP].store(need_wakeup, Relaxed);/'
o=channel/seqpacket/wake_policy.rs
seeded "a sleep without a look"                     $o $q '/fn prepare_sleep/,/^    }/s/state.arm\(\)/false/'
seeded "a sleep although there is work"             $o $q '/fn prepare_sleep/,/^    }/s/let must_stay = state.arm\(\);/state.arm(); let must_stay = false;/'
seeded "a worker that leaves without a word"        $o $q '/fn leave/,/^    }/s/state.asleep > 0 && state.arm\(\)/false/'
seeded "a worker that leaves the rings unarmed"     $o $q '/fn leave/,/^    }/s/state.asleep > 0 && state.arm\(\)/state.asleep > 0 \&\& state.spinner.is_some() \&\& state.active.iter().any(|ring| ring.has_work())/'
seeded "a ring put aside unarmed"                   $o $q '/fn add/,/^    }/s/if oldest.arm\(\)/if oldest.has_work()/'
seeded "a ring put aside with work in it"           $o $q '/fn add/,/^    }/s/^                state.active.push_back\(oldest\);.*//'

seeded "a wake-up for a ring that is empty by now"   $o $q::clients 's/if let Some\(ring\) = &heard.ring \{/if let Some(ring) = heard.ring.as_ref().filter(|ring| ring.has_work()) {/'
seeded "a wake-up that has no ring looked at"       $o $q 's/if let Some\(ring\) = &heard.ring \{/if let Some(ring) = heard.ring.as_ref().filter(|_| false) {/'
seeded "a rest that ends without a wake-up"         $o $q::a_client '/fn resume/,/^    }/s/^            wake_one\(\);$//'
seeded "a rest that ends without a look"            $o $q::a_client '/fn resume/,/^    }/s/if ring.has_work\(\)/if false/'
seeded "a rest that ends without being looked at"   $o $q::a_client_put '/fn resume/,/^    }/s/^            self.activate\(ring\);$//'
seeded "no fence at the end of a rest"              $o $q::a_client '/fn resume/,/^    }/s/^        fence\(SeqCst\);$//'
seeded "a rest that never ends"                     $o $q::a_client '/fn resume/,/^    }/s/if !ring.end_rest\(\)/if !ring.end_rest() || true/'

seeded "a request taken after the server has hung up" $o $q::what_was_not '/fn next_entry/,/^}/s/if ring.is_over\(\)/if false/'

# Loans.
b=channel/seqpacket/borrower.rs
x=channel/seqpacket/lender.rs
a=loan/account.rs
u=loan/kept.rs
i=borrower::model
seeded "an account that is free while a loan is introduced" $x $i::a_loan_is '/Standing::Fits =>/,/^            }/{s/^                account.enter\(id, bytes\);$//; s/^                let message = /account.enter(id, bytes); drop(account); &/}'
seeded "a loan entered that could not be introduced" $x $i::a_loan_that_could '/Standing::Fits =>/,/^            }/{s/^                account.enter\(id, bytes\);$//; s/^                let message = /account.enter(id, bytes); &/}'
seeded "a loan named that could not be introduced"  $x $i::a_loan_that_could 's/^                    return Introduced::No \{ wanted: bytes.max\(1\) \};$/return Introduced::Yes;/'
seeded "a full account that asks for no room"       $x $i::an_account 's/Introduced::No \{ wanted: bytes.max\(1\) \}/NO/'
seeded "an account that is overdrawn by one loan"   $a $i::an_account 's/\(self.lent.len\(\) as u64\) < /(self.lent.len() as u64) <= /'
seeded "an account whose bytes are not added up"    $a $i::an_account 's/let fits = bytes <= self.limits.bytes - self.bytes/let fits = bytes <= self.limits.bytes/'
seeded "a loan struck out whose bytes stay counted" $a $i::an_account 's/^        self.bytes -= bytes;$//'
seeded "a loan that is returned and not struck out" $a $i 's/self.lent.remove\(&id\)/self.lent.get(\&id).copied()/; s/^        self.bytes -= bytes;$//'
seeded "a wish for room that is not announced"      protocol/sender/lend.rs $i::an_account 's/^                if wanted == 0 \{$/if true {/'
seeded "a wish for room that is not heard"          protocol/receiver.rs $i::an_account 's/FOUND_FOR_WANT_OF_ROOM => self.side.offer.make_room\(loan\),/FOUND_FOR_WANT_OF_ROOM => {}/'
seeded "a request asked again that still takes loans" channel.rs $i::a_loan_named_that 's/\(lease, takes_loans\) = \(again, false\)/{ lease = again; let _ = \&mut takes_loans; }/'
seeded "a loan that was returned taken for a breach" channel.rs $i::a_loan_named_that 's/None if takes_loans =>/None if takes_loans \&\& false =>/'
seeded "a request for bytes that is lent to"        channel/seqpacket/client.rs $i::a_loan_named_that 's/if takes_loans \{ Loans::ByLink/if takes_loans || true { Loans::ByLink/'
seeded "a connection that two threads read at once" $b $i::what_one '/fn borrow/,/^    }/s/^        let mut inbox = lock.*/let mut inbox = Inbox::default();/'
seeded "a loan let go of in silence"                $b $i 's/^        self.give_back\(self.kept.make_room\(bytes\)\);$/let _ = self.kept.make_room(bytes);/'
seeded "a descriptor that is lost and not returned" $b $i::a_descriptor 's/Err\(_\) => return self.give_back\(vec!\[id\]\),/Err(_) => return,/'
seeded "a return that found no room, forgotten"     $b $i::a_return 's/^                returned.truncate\(.*/returned.clear();/'
seeded "a return that waits for the next one"       $b $i::a_return '/fn give_back/,/^    }/s/^        let mut returned = /if ids.is_empty() { return; } &/'
seeded "a return that is not sent when its loan is named" $b $i::a_loan_whose 's/^        self.give_back\(Vec::new\(\)\);.*//'
seeded "an introduction that nobody looked for, left unread" $b $i::an_introduction '/fn make_room/,/^    }/s/^        self.take_in_all\(\);$/if false { self.take_in_all(); }/'
seeded "a reset taken for the end"                  $b $i::a_loan_named_by 's/^            Err\(Error::Disconnected\) => self.socket.receive.*/Err(Error::Disconnected) => return Ok(None),/'
seeded "a loan let go of while a body holds it"     $u $i::a_receiver 's/ && !entry.is_pinned\(\)//'
seeded "loans let go of for each answer that crossed a return" $u $i::answers 's/if table.freed.is_some_and\(.*\) \{/if false {/'
seeded "a loan without bytes that counts as nothing" $u $i::answers 's/\(before - table.bytes\).max\(1\)/(before - table.bytes)/'
seeded "a connection that is not there until the request counts as sent" protocol/offer.rs $i::a_reply '/fn connection\(/,/^    }/s/^        lock\(&self.connection\).clone\(\)$/match *lock(\&self.state) { OfferState::Unsent(_) => None, _ => lock(\&self.connection).clone() }/'

# Tasks, which wait without a thread.
l=peer/link.rs
y=channel/seqpacket/signal.rs
j=signal::model
seeded "no fence after a question"                  $l $j::a_task_takes '/fn ask\(/,/^    }/s/^        fence\(SeqCst\);$//'
seeded "a question outside the lock"                $l $j::two_tasks '/fn wake_later/,/^    }/s/^            self.link.ask\(\);$/drop(state); self.link.ask(); return;/'
bound=3 seeded "a waker left after the question"            $l $j::two_tasks '/fn wake_later/,/^    }/{s/^        if mem::replace.*/        if true {/; s/^        let before = state.wakers.insert.*/if !mem::replace(\&mut state.has_asked, true) { self.link.ask(); } drop(state); let mut state = lock(\&self.link.state); &/}'
seeded "a waker that is not left"                   $l $j::a_task_takes 's/let before = state.wakers.insert\(self.number, waker\);/let before = Some(waker);/'
seeded "a waker that is not replaced"               $l $j::the_last 's/let before = state.wakers.insert\(self.number, waker\);/let before = Some(state.wakers.entry(self.number).or_insert(waker).clone());/'
seeded "a look that does not ask anew"              $l $j::two_tasks '/fn look/,/^    }/s/^ +self.ask\(\);$//'
seeded "a look that asks when it has looked"        $l $j::two_tasks '/fn look/,/^    }/s/^                wakers.extend\(state.take_ready\(\)\);$//'
seeded "a look that keeps quiet about not asking"   $l $j::a_task_takes '/fn look/,/^    }/{s/^ +state.has_asked = (.*);$/let is_awaited = \1;/; s/^            if state.has_asked \{$/if is_awaited {/}'
seeded "a look that wakes nobody"                   $l $j::a_task_takes '/fn look/,/^    }/s/^        wakers.into_iter.*//'
seeded "a severed link that wakes no task"          $l $j::the_end_of_a_link '/fn sever/,/^    }/s/^        wakers.into_iter.*//'
seeded "a process that does not ask itself"         $l $j::within 's/asked.store\(true, Relaxed\)/asked.store(false, Relaxed)/'
seeded "a process that does not look when it posts" $l $j::within 's/Other::Here\(asked\) if asked.load\(Relaxed\) => self.look\(\)/Other::Here(asked) if asked.load(Relaxed) => {}/'
seeded "a peer that has asked and is not signalled" $l $j::a_task_takes 's/Some\(signal\) if signal.is_asked\(\) => signal.signal\(\)/Some(signal) if signal.is_asked() => {}/'
seeded "a later question lowered"                   $y $j::a_task_takes 's/^            let _ = self.words\[self.theirs\].compare_exchange\(.*/self.words[self.theirs].swap(0, Relaxed);/'
seeded "a question with the same number"            $y $j::a_task_takes 's/let number = self.asked.fetch_add\(1, Relaxed\) \+ 1;/let number = 1;/'
seeded "a question lowered before its signal is sent" $y $j::a_signal_that_fails 's/^        if number != 0 && self.send\(\).is_ok\(\) \{$/let lowered = self.words[self.theirs].compare_exchange(number, 0, Relaxed, Relaxed); if lowered.is_ok() \&\& self.send().is_ok() {/'
seeded "a signal that failed counted as sent"       $y $j::a_signal_that_fails 's/self.send\(\).is_ok\(\)/(self.send().is_ok() || true)/'
seeded "a question that is never lowered"           $y $j::a_task_takes 's/^            let _ = self.words\[self.theirs\].compare_exchange\(.*//'
seeded "a signal that nobody asked for"             $y $j::a_task_takes 's/self.words\[self.theirs\].load\(Relaxed\) != 0$/true/; s/if number != 0 && /if /'
seeded "a signal read in passing, and no look"      $b $j::a_signal_read 's/^        self.signalled.store\(true, Relaxed\);$//'
seeded "only a signal taken for one"                $b $j::a_full_connection_read 's/^        self.signalled.store\(true, Relaxed\);$//; s/Message::Wakeup => Ok\(Some\(Heard::Signal\)\)/Message::Wakeup => { self.signalled.store(true, Relaxed); Ok(Some(Heard::Signal)) }/'
seeded "poison that is no news"                     $s $j::an_abort 's/self.word.load\(Acquire\) != 0$/self.word.load(Acquire) \& !POISON != 0/'
seeded "news of the wrong side"                     $e $j::a_task_receives 's/self.header\(\).filled.is_settled\(\)/self.header().free.is_settled()/'
seeded "no second try once the waker is left"       $v $j::a_task_takes '/fn poll_permit/,/^}/s/^    match semaphore.try_wait\(\) \{$/match settled {/'
seeded "a task that does not look at the link"      $v $j::a_severed '/fn poll_permit/,/^}/s/if is_severed\(\)/if is_severed() \&\& false/'
seeded "a chunk that signals nobody"                $t $j::a_task_receives '/fn hand_over/,/^    }/s/^            self.stand.link.*//'
seeded "an end that signals nobody"                 $t $j::a_task_receives '/fn end\(/,/^    }/s/^        link.wake_tasks\(\);$//'
seeded "an abort that signals nobody"               $t $j::an_abort '/fn abort/,/^    }/s/^        link.wake_tasks\(\);$//'
seeded "a sender's task that leaves no waker"       $t $j::a_task_sends_what_a_thread 's/^            writer.wake_later\(task\);$//'
seeded "a slot that goes back and signals nobody"   $k $j::a_task_sends_what_a_thread 's/^                self.side.offer.wake_tasks\(\);$//'
seeded "a cancellation that signals nobody"         $r $j::a_cancellation '/fn end\(/,/^    }/s/^            link.iter.*//'
seeded "a signal before the permit"                 $t $j::a_task_receives '/fn hand_over/,/^    }/{s/^            self.stand.link.*//; s/^        header.filled.add\(permit\);$/self.stand.link().into_iter().for_each(Link::wake_tasks); &/}'
seeded "a request sent whose task is not woken"     $f $j::a_request_sent 's/^        wake\(before\);.*/let _ = before;/'
seeded "a task that waits for no request"           $f $j::a_request_sent 's/OfferState::Unsent\(waker\) => \*waker = Some\(task.clone\(\)\)/OfferState::Unsent(_) => {}/'
seeded "a request dropped whose task is not woken"  $f $j::a_request_dropped '/fn abandon/,/^    \}/s/^                waker.into_iter\(\).*//'
seeded "a task woken under the lock of its request" $f $j::a_task_that_runs '/fn sent_over/,/^    \}/{s/^        drop\(state\);$//; s/^        wake\(before\);.*/wake(before); drop(state);/}'
seeded "a task woken under the lock of what it dropped" $f $j::a_task_that_runs '/fn abandon/,/^    \}/s/^                drop\(state\);.*//'

x=protocol/sender/wanted.rs
seeded "a withdrawal that tells nobody"             $r $j::a_withdrawal_ends 's/^        is_answering \|\| withdrawn.is_ok\(\)$/        is_answering/'
seeded "an end that is told within no process"      $l $j::within_a_process_a_withdrawal '/fn tell_end/,/^    }/s/Other::Here\(_\) => self.look\(\)/Other::Here(_) => {}/'
seeded "an answer that is complete and cancelled"   $r $j::an_answer_that_is_complete 's/^        self.is_complete = true;$//'
seeded "a look that keeps those who work in vain"   $l $j::a_withdrawal_ends 's/^        let mut wakers = state.take_idle\(\);/let mut wakers = Vec::new();/'
seeded "a severed link that wakes nobody who works" $l $j::the_end_of_a_link_ends 's/let all = all.chain\(self.work.*/let all = all.chain([]);/'
seeded "work that is looked at before its waker is left" $x $j::a_withdrawal_ends '/fn poll_lost/,/^    }/{s/^        let before = .*/        let lost = request.is_given_up(); &/; s/request.is_given_up\(\) \|\| /lost || /}'
seeded "a given-up answer that is not noticed"      $x $j::a_cancellation_ends 's/receiver.cancelled.load\(Relaxed\) != 0/receiver.cancelled.load(Relaxed) == 2/'
seeded "an answer that counts as given up when its segment is used again" $x $j::an_answer_that_is_complete 's/!self.is_answered.load\(Relaxed\)/true/'
seeded "a link let go of before the withdrawal" $r $j::a_withdrawal_of_what '/fn end\(/,/^    }/s/^        let breaks_off = .*/        let link = self.offer.end(); &/; /fn end\(/,/^    }/s/^        let link = self.offer.end\(\);$//'
seeded "a withdrawal that overlooks a request just being sent" $f $j::a_withdrawal_of_what '/fn sent_over/,/^    }/s/^            link.tell_end\(\);.*//'

z=fair_semaphore::model
seeded "a turn given up and not passed on"          $n $z '/fn give_up/,/^    }/s/^                self.leave\(\);$//'
seeded "a turn given up that stays in line"         $n $z '/fn give_up/,/^    }/s/Some\(at\) => _ = state.queue.remove\(at\)/Some(_) => {}/'
seeded "a turn that wakes no task"                  $n $z '/fn leave/,/^    }/s/^                task.into_iter\(\).*//'
seeded "a turn that wakes the first who tried"      $n $z '/Some\(me\) if/,/^            }/s/^                \*lock\(&me.task\) = .*//'
seeded "a task that enters past the line"           $n $z '/fn poll_enter/,/^    }/s/if state.queue.iter\(\).any\(.*\) =>/if state.queue.iter().any(|waiter| Arc::ptr_eq(waiter, me)) \&\& state.queue.len() > 1 =>/'
seeded "a lease given up and not passed on"         segment/pool/leasing.rs $m::a_task_that_leases 's/^        self.pool.available.give_up\(&mut self.place\);$//'
seeded "a lease that keeps its turn"                segment/pool/leasing.rs $m::a_task_that_leases 's/^        self.is_granted = false;$//'

echo "$found faults found"
[ "$missed" = 0 ]
