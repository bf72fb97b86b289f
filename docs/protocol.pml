/*
 * The transfer as a model: one receiver with a pool of one segment, senders that may be late or die
 * at any step, and a watcher that pushes the death. `ci/model.sh` checks it with spin.
 *
 * Phases and rules are those of protocol.md. A semaphore is a counter and a poison bit whose wait is
 * a guard: that no wake-up is lost below that is argued in src/sync/semaphore.rs, not here.
 *
 * Checked in every interleaving:
 *   - a receiver never reads a slot that another generation has written (P1, P6);
 *   - a sender never writes to a segment that was given to another generation (P6);
 *   - permits are never more than slots;
 *   - nobody waits for ever: no end state but the proper one (P7);
 *   - at the end the pool has its one segment, idle or lingering, and nobody but a late sender has
 *     any other.
 *
 * -DTIMEOUTS    any wait of the receiver may end by its deadline (a stopped sender, a slow one)
 * -DCRASHES     the sender's process may die at any step
 * -DSTEADFAST   the sender never gives up by itself
 */

#define SLOTS    2          /* slots of the segment */
#define CHUNKS   3          /* chunks of a file: more than slots, so that slots are used again */
#ifndef GENERATIONS
#define GENERATIONS 2       /* transfers, one after the other; more with -DGENERATIONS=3 */
#endif
#define SEGMENTS GENERATIONS

mtype = { Idle, Offered, Accepted, Announced, Finished, Refused, Aborted, Withdrawn };

typedef Segment {
    byte generation;        /* the turn word: both change in one step, by compare-exchange */
    mtype phase;
    byte filled, free;
    bool filled_poison, free_poison, cancelled;
    byte tag[SLOTS];        /* which generation's bytes are in a slot */
    bool last[SLOTS];
    bool retired;           /* unmapped by the receiver */
};

Segment segment[SEGMENTS];
byte leased;                /* the generation that the receiver runs, 0 for none */
byte leased_segment;
bool enrolled;              /* the receiver's link watches over the leased segment */
bool dead;                  /* the sender's process is gone */
bool severed;               /* and the receiver's process knows */
bool receiver_done;

chan requests = [GENERATIONS] of { byte, byte };    /* segment, generation */

#define off(p) (p == Idle || p == Finished || p == Refused || p == Aborted || p == Withdrawn)

/* One compare-exchange on the turn word, which a dead process does not come to. */
inline advance(alive, seg, gen, from, to, ok) {
    atomic {
        ok = (alive && segment[seg].generation == gen && segment[seg].phase == from);
        if
        :: ok -> segment[seg].phase = to
        :: else -> skip
        fi
    }
}

/* What a sender may write to: a segment of its own generation, or one that nobody reads any more. */
#define ours(s, g)  (segment[s].retired || segment[s].generation == g)

/* A worker of the cache. All of them are one process: `dead` ends them between any two steps. */
proctype Worker() {
    byte s, g, cursor, sent;
    bool won;
end_take:
    do
    :: requests ? s, g -> cursor = 0; sent = 0;
        advance(!dead, s, g, Offered, Accepted, won);
        if
        :: dead -> goto gone
        :: !dead && !won -> goto end_take      /* stale: nothing was written */
        :: !dead && won -> skip
        fi;
        if
        :: dead -> goto gone
        :: !dead -> skip                       /* accept */
        :: !dead -> goto refuse
        fi;
chunk:
        if
        :: dead -> goto gone
        :: !dead && segment[s].free_poison -> goto abort        /* cancelled, or severed */
#ifndef STEADFAST
        :: !dead -> goto abort                                  /* dropped, panicked, source failed */
#endif
        :: atomic { !dead && !segment[s].free_poison && segment[s].free > 0 -> segment[s].free-- }
        fi;
        if
        :: dead -> goto gone
        :: atomic { !dead ->
                /* The file is read into the slot. */
                assert(ours(s, g));
                assert(segment[s].phase == Accepted || segment[s].phase == Announced);
                segment[s].tag[cursor] = g;
                sent++;
                segment[s].last[cursor] = (sent == CHUNKS)
            }
        fi;
        if
        :: dead -> goto gone
        :: !dead && sent == 1 -> advance(!dead, s, g, Accepted, Announced, won); assert(won || dead)
        :: !dead && sent > 1 -> skip
        fi;
        if
        :: dead -> goto gone
        :: atomic { !dead -> assert(ours(s, g)); segment[s].filled++; assert(segment[s].filled <= SLOTS) }
        fi;
        cursor = (cursor + 1) % SLOTS;
        if
        :: dead -> goto gone
        :: !dead && sent < CHUNKS -> goto chunk
        :: !dead && sent == CHUNKS -> advance(!dead, s, g, Announced, Finished, won); assert(won || dead); goto end_take
        fi;
refuse:
        if
        :: dead -> goto gone
        :: atomic { !dead -> segment[s].free--; segment[s].last[0] = true; segment[s].tag[0] = g }
        fi;
        if
        :: dead -> goto gone
        :: atomic { !dead -> assert(ours(s, g)); segment[s].filled++ }
        fi;
        if
        :: dead -> goto gone
        :: !dead -> advance(!dead, s, g, Accepted, Refused, won); assert(won || dead); goto end_take
        fi;
abort:
        if
        :: dead -> goto gone
        :: atomic { !dead -> assert(ours(s, g)); segment[s].filled_poison = true }
        fi;
        if
        :: dead -> goto gone
        :: atomic { !dead ->
                assert(segment[s].generation == g);
                assert(segment[s].phase == Accepted || segment[s].phase == Announced);
                segment[s].phase = Aborted              /* the last write */
            }
        fi
    :: dead || (receiver_done && empty(requests)) -> goto gone
    od;
gone:
    skip
}

#ifdef CRASHES
active proctype Death() {
    dead = true
}
#endif

/* The receiver's process learns of the death, and poisons what is enrolled, under the link's lock. */
active proctype Watcher() {
    if
    :: atomic { dead -> severed = true;
            if
            :: enrolled ->
                segment[leased_segment].filled_poison = true;
                segment[leased_segment].free_poison = true
            :: else -> skip
            fi
        }
    :: receiver_done
    fi
}

active proctype Receiver() {
    byte g = 1, s = 0, fresh = 0, cursor;
    bool won, lingering = false, found;

    segment[0].phase = Idle;
    run Worker(); run Worker();

    do
    :: g <= GENERATIONS ->
        /* Lease: an idle segment, or a lingering one that settles, or a fresh one in its place. */
        if
        :: !lingering -> skip
        :: lingering ->
            do
            :: atomic { off(segment[s].phase) -> segment[s].phase = Idle; break }
            /* Hung up and dead for certain: by compare-exchange, as everything. */
            :: atomic { severed && dead && !off(segment[s].phase) -> segment[s].phase = Idle; break }
            /* The grace is over. */
            :: atomic { !off(segment[s].phase) ->
                    segment[s].retired = true; fresh++; s = fresh; segment[s].phase = Idle; break }
            od;
            lingering = false
        fi;

        /* Offer: reset, then open the next generation. */
        segment[s].filled = 0; segment[s].free = SLOTS;
        segment[s].filled_poison = false; segment[s].free_poison = false;
        segment[s].cancelled = false;
        cursor = 0; found = false;
        atomic {
            assert(segment[s].phase == Idle);
            segment[s].generation = g; segment[s].phase = Offered;
            leased = g; leased_segment = s
        };
        requests ! s, g;
        /* Sent, then enrolled; a link that is severed already poisons at once. */
        atomic { enrolled = true;
            if
            :: severed -> segment[s].filled_poison = true; segment[s].free_poison = true
            :: else -> skip
            fi
        };

        /* Take filled slots until the last. Permits are drained before poison is looked at. */
        do
        :: atomic { segment[s].filled > 0 ->
                segment[s].filled--;
                assert(segment[s].tag[cursor] == g) };
            /* The kernel passes the slot on, while nobody else may write to it. */
            assert(segment[s].tag[cursor] == g);
            if
            :: segment[s].last[cursor] -> break
            :: !segment[s].last[cursor] ->
                cursor = (cursor + 1) % SLOTS;
                atomic { segment[s].free++; assert(segment[s].free <= SLOTS) }
            fi
        :: atomic { segment[s].filled == 0 && segment[s].filled_poison -> break }
        :: segment[s].filled > 0 -> break           /* the receiver is dropped early */
#ifdef TIMEOUTS
        :: break                                    /* the deadline */
#endif
        od;

        /* Drop: out of the link's reach, withdraw or cancel, give back. */
        atomic { enrolled = false };
        advance(true, s, g, Offered, Withdrawn, won);
        if
        :: segment[s].phase == Accepted || segment[s].phase == Announced ->
            segment[s].cancelled = true;
            segment[s].free_poison = true
        :: else -> skip
        fi;
        atomic {
            if
            :: off(segment[s].phase) -> segment[s].phase = Idle
            :: else -> lingering = true
            fi
        };
        g++
    :: g > GENERATIONS -> break
    od;
    /* The pool has its segment: idle, or lingering until its sender is off or replaced. */
    assert(lingering || segment[s].phase == Idle);
    assert(!segment[s].retired);
    receiver_done = true
}
