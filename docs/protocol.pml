/*
 * The transfer as a model: one receiver with a pool of one segment, senders in one or two servers
 * that may be late or die at any step, connections that end, and a watcher in each process.
 * `ci/model.sh` checks it with spin.
 *
 * Phases and rules are those of protocol.md. A semaphore is a counter and a poison bit whose wait is
 * a guard: that no wake-up is lost below that is argued in src/sync/semaphore.rs, not here.
 *
 * Checked in every interleaving:
 *   - a receiver never reads a slot that another generation has written (P1, P6);
 *   - a sender never writes to a segment that was given to another generation (P6);
 *   - a watcher poisons nothing on behalf of another generation than the one there (P7);
 *   - a generation is accepted once, by one sender (P1);
 *   - permits are never more than slots;
 *   - nobody waits for ever: no end state but the proper one (P7);
 *   - at the end the pool has its one segment, idle or quarantined, and nobody but a late sender has
 *     any other.
 *
 * -DTIMEOUTS    any wait of the receiver may end by its deadline (a stopped sender, a slow one)
 * -DCRASHES     the first server's process may die at any step
 * -DHANGUPS     the first server's connection may end at any step although both processes live;
 *               the receiver then asks a second server, and the first one's worker may be late
 * -DAPART       the request is sent, or dropped unsent, by another thread than the receiver's
 * -DORPHANS     the receiver's process may die at any step
 * -DSTEADFAST   the sender never gives up by itself
 */

#define SLOTS    2          /* slots of the segment */
#define CHUNKS   3          /* chunks of a file: more than slots, so that slots are used again */
#ifndef GENERATIONS
#define GENERATIONS 2       /* transfers, one after the other; more with -DGENERATIONS=3 */
#endif
#define SEGMENTS GENERATIONS
#define WORKERS  2

/* A process that dies stops between any two steps. */
#ifdef CRASHES
#define until_dead(server)  unless { dead[server] }
#else
#define until_dead(server)
#endif
#ifdef ORPHANS
#define until_orphaned      unless { orphaned }
#else
#define until_orphaned
#endif

/* The two workers are in one process, or the second one is in a server of its own. */
#ifdef HANGUPS
#define SERVERS  2
#define server_of(w) (w)
#else
#define SERVERS  1
#define server_of(w) 0
#endif

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
bool accepted[GENERATIONS + 1];

/* The connection to each server, and its two links: one in each process, which learn of its end
   one after the other. */
bool hung_up[SERVERS];
bool dead[SERVERS];             /* the server's process is gone */
bool orphaned;                  /* the receiver's process is gone */

/* The receiver's process. */
bool receivers_link_severed[SERVERS];
byte over;                      /* the last generation whose transfer is over */
bool enrolled;                  /* a link poisons this segment and generation: registered */
byte enrolled_segment, enrolled_generation, enrolled_link;

/* The servers' processes. */
bool senders_link_severed[SERVERS];
bool covered[WORKERS];          /* the link poisons this segment and generation */
byte covered_segment[WORKERS], covered_generation[WORKERS];

bool receiver_done;

chan requests[SERVERS] = [GENERATIONS] of { byte, byte };    /* segment, generation */
#ifdef APART
chan unsent = [GENERATIONS] of { byte, byte };
#endif

#define off(p) (p == Idle || p == Finished || p == Refused || p == Aborted || p == Withdrawn)

/* One compare-exchange on the turn word. */
inline advance(seg, gen, from, to, ok) {
    atomic {
        ok = (segment[seg].generation == gen && segment[seg].phase == from);
        if
        :: ok -> segment[seg].phase = to
        :: else -> skip
        fi
    }
}

/* What a sender may write to: a segment of its own generation, or one that nobody reads any more. */
#define ours(s, g)  (segment[s].retired || segment[s].generation == g)

/* A worker of a server. It stops between any two steps when its process dies. */
proctype Worker(byte me) {
    byte s, g, cursor, sent;
    bool won;
end_take:
    {
    if
    :: requests[server_of(me)] ? s, g ->
        atomic {
            advance(s, g, Offered, Accepted, won);
            if
            :: won -> assert(!accepted[g]); accepted[g] = true
            :: !won -> s = 0; g = 0; goto end_take     /* stale: nothing was written */
            fi
        };
        /* In reach of its own link from here on; a link that is severed already poisons at once. */
        atomic { covered[me] = true; covered_segment[me] = s; covered_generation[me] = g;
            if
            :: senders_link_severed[server_of(me)] -> segment[s].free_poison = true
            :: else -> skip
            fi
        };
        if
        :: skip                                /* accept */
        :: goto refuse
        fi;
chunk:
        if
        :: segment[s].free_poison -> goto abort         /* cancelled, or severed */
#ifndef STEADFAST
        :: goto abort                                   /* dropped, panicked, source failed */
#endif
        :: atomic { !segment[s].free_poison && segment[s].free > 0 -> segment[s].free-- }
        fi;
        atomic {
            /* The file is read into the slot, whatever has become of the connection meanwhile. */
            assert(ours(s, g));
            assert(segment[s].phase == Accepted || segment[s].phase == Announced);
            segment[s].tag[cursor] = g;
            sent++;
            segment[s].last[cursor] = (sent == CHUNKS)
        };
        if
        :: atomic { sent == 1 -> advance(s, g, Accepted, Announced, won); assert(won) }
        :: sent > 1
        fi;
        atomic { assert(ours(s, g)); segment[s].filled++; assert(segment[s].filled <= SLOTS);
            cursor = (cursor + 1) % SLOTS;
            if
            :: sent < CHUNKS -> goto chunk
            :: else -> skip
            fi
        };
        covered[me] = false;
        advance(s, g, Announced, Finished, won);                /* the last write */
        goto left;
refuse:                                 /* or lent: no bytes follow either, and it ends as Finished */
        atomic { segment[s].free--; segment[s].last[0] = true; segment[s].tag[0] = g };
        atomic { assert(ours(s, g)); segment[s].filled++; assert(segment[s].filled <= SLOTS) };
        covered[me] = false;
        advance(s, g, Accepted, Refused, won);                  /* the last write */
        goto left;
abort:
        atomic { assert(ours(s, g)); segment[s].filled_poison = true };
        covered[me] = false;
        atomic {
            won = (segment[s].generation == g
                && (segment[s].phase == Accepted || segment[s].phase == Announced));
            segment[s].phase = Aborted                          /* the last write */
        };
left:
        atomic { assert(won); s = 0; g = 0; cursor = 0; sent = 0; won = false; goto end_take }
#ifdef HANGUPS
    :: hung_up[server_of(me)]                  /* it takes nothing more from this connection */
#endif
    fi
    } until_dead(server_of(me))
}

#ifdef CRASHES
active proctype Death() {
    atomic { dead[0] = true; hung_up[0] = true }
}
#endif

#ifdef HANGUPS
/* The receiver dropped its requester, or the server dropped the client. Both live on. */
active proctype HangUp() {
    hung_up[0] = true
}
#endif

#ifdef ORPHANS
active proctype Orphaning() {
    atomic {
        orphaned = true; hung_up[0] = true;
#ifdef HANGUPS
        hung_up[1] = true
#endif
    }
}
#endif

/* The receiver's process learns that a connection ended, and poisons what its own side waits on:
   `filled` of what is registered (`enrolled` here), under the link's lock. */
proctype ReceiversWatcher(byte link) {
end_watch:
    {
        atomic { hung_up[link] -> receivers_link_severed[link] = true;
            if
            :: enrolled && enrolled_link == link ->
                assert(segment[enrolled_segment].generation == enrolled_generation);
                segment[enrolled_segment].filled_poison = true
            :: else -> skip
            fi
        }
    } until_orphaned
}

/* A server's process learns of it, too, and poisons `free` of what its workers are on. */
proctype SendersWatcher(byte link) {
    byte w;
end_watch:
    {
        atomic { hung_up[link] -> senders_link_severed[link] = true;
            w = 0;
            do
            :: w < WORKERS ->
                if
                :: covered[w] && server_of(w) == link ->
                    assert(ours(covered_segment[w], covered_generation[w]));
                    segment[covered_segment[w]].free_poison = true
                :: else -> skip
                fi;
                w++
            :: else -> break
            od;
            w = 0
        }
    } until_dead(link)
}

/* The request goes over the connection to the server that is there, and the transfer is registered
   with that link, unless it is over by then. */
inline send(s, g, link) {
    atomic {
#ifdef HANGUPS
        link = (receivers_link_severed[0] -> 1 : 0);
#endif
        requests[link] ! s, g
    };
    atomic {
        if
        :: g > over ->
            enrolled = true; enrolled_link = link; enrolled_segment = s; enrolled_generation = g;
            if
            :: receivers_link_severed[link] ->
                assert(segment[s].generation == g);
                segment[s].filled_poison = true
            :: else -> skip
            fi
        :: else -> skip
        fi
    }
}

#ifdef APART
/* The thread that sends requests. One that cannot be sent is dropped, which ends its transfer. */
proctype Requester() {
    byte s, g, link;
end_idle:
    {
    if
    :: unsent ? s, g ->
        if
        :: send(s, g, link)
        :: atomic {
                /* Under the offer's lock: the transfer cannot end meanwhile. */
                if
                :: g > over && segment[s].generation == g && segment[s].phase == Offered ->
                    segment[s].phase = Withdrawn; segment[s].filled_poison = true
                :: else -> skip
                fi
            }
        fi;
        atomic { s = 0; g = 0; link = 0; goto end_idle }
    fi
    } until_orphaned
}
#endif

active proctype Receiver() {
    byte g = 1, s = 0, fresh = 0, cursor, link;
    bool won, lingering = false, severed;

    atomic {
        segment[0].phase = Idle;
        run Worker(0); run Worker(1);
        run ReceiversWatcher(0); run SendersWatcher(0);
#ifdef HANGUPS
        run ReceiversWatcher(1); run SendersWatcher(1);
#endif
#ifdef APART
        run Requester();
#endif
    };
    {
    do
    :: g <= GENERATIONS ->
        /* Lease: an idle segment, or a quarantined one (`lingering` here) that settles, or a fresh one
           in its place. */
        if
        :: !lingering -> skip
        :: lingering ->
            do
            :: atomic { off(segment[s].phase) -> segment[s].phase = Idle; break }
            /* Hung up and dead for certain: by compare-exchange, as everything. */
            :: atomic { receivers_link_severed[link] && dead[link] && !off(segment[s].phase) ->
                    segment[s].phase = Idle; break }
            /* The grace is over. */
            :: atomic { !off(segment[s].phase) ->
                    segment[s].retired = true; fresh++; s = fresh; segment[s].phase = Idle; break }
            od;
            lingering = false
        fi;

        /* Offer: reset, then open the next generation. */
        atomic {
            segment[s].filled = 0; segment[s].free = SLOTS;
            segment[s].filled_poison = false; segment[s].free_poison = false;
            segment[s].cancelled = false;
        }
        atomic {
            assert(segment[s].phase == Idle);
            cursor = 0;
            segment[s].generation = g; segment[s].phase = Offered
        };
#ifdef APART
        unsent ! s, g;
#else
        send(s, g, link);
#endif

        /* Take filled slots until the last. Permits are drained before poison is looked at. */
        do
        :: atomic { segment[s].filled > 0 ->
                segment[s].filled--;
                assert(segment[s].tag[cursor] == g) };
            /* The kernel passes the slot on, while nobody else may write to it. */
            assert(segment[s].tag[cursor] == g);
            if
            :: segment[s].last[cursor] -> break
            :: atomic { !segment[s].last[cursor] ->
                    cursor = (cursor + 1) % SLOTS;
                    segment[s].free++; assert(segment[s].free <= SLOTS) }
            fi
        :: atomic { segment[s].filled == 0 && segment[s].filled_poison -> break }
        :: segment[s].filled > 0 -> break           /* the receiver is dropped early */
#ifdef TIMEOUTS
        :: break                                    /* the deadline */
#endif
        od;

        /* Drop: out of the link's reach, withdraw or cancel, give back. */
        atomic { over = g;
            severed = enrolled && receivers_link_severed[enrolled_link];
            link = (enrolled -> enrolled_link : 0);
            enrolled = false; enrolled_segment = 0; enrolled_generation = 0; enrolled_link = 0
        };
        advance(s, g, Offered, Withdrawn, won);
        if
        :: severed && won ->
            /* No sender has it, and none can take it any more: it is asked again, through this same
               segment, by the next generation, of the successor. */
            segment[s].phase = Idle
        :: else ->
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
            }
        fi;
        g++
    :: g > GENERATIONS -> break
    od;
    /* The pool has its segment: idle, or quarantined until its sender is off or replaced. */
    assert(lingering || segment[s].phase == Idle);
    assert(!segment[s].retired);
    receiver_done = true
    } until_orphaned
}
