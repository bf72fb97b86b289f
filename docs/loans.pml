/*
 * Loans as a model: a client with several threads, a server with several workers and its successor,
 * and what they tell each other. `ci/model.sh` checks it with spin.
 *
 * Rules are those of protocol.md (N). The transfer itself is in protocol.pml: here an announcement is
 * one step, after which the segment is free. Content stands for the memory that a descriptor leads
 * to: each server has its own for each number.
 *
 * Checked in every interleaving:
 *   - a receiver reads the content that its answer named, of the server that answered (N3);
 *   - a loan is named only to a client that has it, or that has let go of it, or lost it (N3);
 *   - a request is asked once more at most (N3);
 *   - a loan is introduced to a client only while it does not have it (N3);
 *   - a client is never lent more than its budget (N6), and returns only what it was lent;
 *   - at the end the server counts as lent what the client has, and nothing else (N5, N6);
 *   - nobody waits for ever.
 *
 * -DBUDGET=n    how many loans a client may have; 1 unless said
 * -DLOSSES      the client may have no number left for a descriptor
 * -DHOLDS       a receiver may hold what it was lent for ever
 * -DCRASHES     the server's process may die at any step; its successor uses the same numbers anew
 * -DORPHANS     the client's process may die at any step
 */

#define LOANS    2
#ifndef BUDGET
#define BUDGET   1
#endif
#ifndef ASKS
#define ASKS     1          /* how often the first thread asks; the second asks once */
#endif
#define asks(t)  (t == 0 -> ASKS : 1)
#define THREADS  2

#ifdef CRASHES
#define SERVERS  2
#define until_dead(s)   unless { dead[s] }
#else
#define SERVERS  1
#define until_dead(s)
#endif
#ifdef ORPHANS
#define until_orphaned  unless { orphaned }
#else
#define until_orphaned
#endif

mtype = { Nothing, Lent, Found };

/* A loan of a server, in tables of both sides. */
#define of(s, l)        ((s) * LOANS + (l))
/* What a descriptor leads to; zero is none. */
#define content(s, l)   (of(s, l) + 1)

typedef Answer {
    mtype status;
    byte loan;
    bool wanted;            /* it could be lent, had the client returned others */
};

Answer answer[THREADS];     /* the announcement in each thread's segment */
bool dead[SERVERS];
bool orphaned;
byte running = THREADS + 1; /* threads of the client that have not ended */

/* A connection to each server: the ring of requests, and messages both ways. */
chan requests[SERVERS] = [THREADS * 2] of { byte, byte, bool };  /* thread, loan, takes loans */
chan to_client[SERVERS] = [1] of { byte, byte };                 /* loan, content */
chan to_server[SERVERS] = [4] of { byte };                       /* loan */

/* The servers' processes. */
bool lent[SERVERS * LOANS];
byte count[SERVERS];
bool account_locked[SERVERS];

/* The client's process. */
byte kept[SERVERS * LOANS];         /* the content */
byte pins[SERVERS * LOANS];         /* bodies that hold it */
bool let_go[SERVERS * LOANS];       /* once: evicted, or lost */
bool untold[SERVERS * LOANS];       /* let go of, and the server not told yet */
bool reading[SERVERS];              /* the connection is read by a thread */

/* A worker of a server. It never waits for the client. */
proctype Worker(byte s) {
    byte t, l;
    bool takes, known, fits_not;
end_take:
    {
    if
    :: requests[s] ? t, l, takes ->
        known = false; fits_not = false;
        if
        :: takes ->
            atomic { !account_locked[s] -> account_locked[s] = true };
            if
            :: lent[of(s, l)] -> known = true
            :: !lent[of(s, l)] && count[s] >= BUDGET -> fits_not = true
            :: !lent[of(s, l)] && count[s] < BUDGET ->
                if
                :: atomic { nfull(to_client[s]) -> to_client[s] ! l, content(s, l) };
                    lent[of(s, l)] = true; count[s]++; known = true
                :: skip         /* the connection is full, or too many descriptors are on their way */
                fi
            fi;
            assert(count[s] <= BUDGET);
            account_locked[s] = false
        :: !takes -> skip
        fi;
        atomic {
            answer[t].loan = l; answer[t].wanted = fits_not;
            answer[t].status = (known -> Lent : Found);
            t = 0; l = 0; takes = false; known = false; fits_not = false;
            goto end_take
        }
    fi
    } until_dead(s)
}

/* Hears what the client has returned. */
proctype Hearer(byte s) {
    byte l;
end_hear:
    {
    if
    :: to_server[s] ? l ->
        atomic { !account_locked[s] -> account_locked[s] = true };
        atomic {
            assert(lent[of(s, l)]);                 /* or the client is hung up on */
            lent[of(s, l)] = false; count[s]--;
            account_locked[s] = false;
            l = 0; goto end_hear
        }
    fi
    } until_dead(s)
}

#ifdef CRASHES
active proctype Death() {
    atomic {
        dead[0] = true;
        /* What only the dead process knew is gone; what it had sent can be read. */
        account_locked[0] = false; count[0] = 0; lent[of(0, 0)] = false; lent[of(0, 1)] = false;
        do
        :: requests[0] ? _, _, _
        :: to_server[0] ? _
        :: empty(requests[0]) && empty(to_server[0]) -> break
        od
    }
}
#endif

#ifdef ORPHANS
active proctype Orphaning() {
    orphaned = true
}
#endif

/* Tells the server what was let go of. While the connection is full, that waits for the next time. */
inline give_back(s, i) {
    atomic {
        i = 0;
        do
        :: i < LOANS && dead[s] -> untold[of(s, i)] = false; i++
        :: i < LOANS && !dead[s] && untold[of(s, i)] && nfull(to_server[s]) ->
            untold[of(s, i)] = false;
            to_server[s] ! i;
            i++
        :: i < LOANS && !dead[s] && (!untold[of(s, i)] || full(to_server[s])) -> i++
        :: i == LOANS -> i = 0; break
        od
    }
}

/* Reads one message, in two steps. `got` says whether there was one. */
inline read_one(s, n, c, got) {
    atomic {
        if
        :: nempty(to_client[s]) -> to_client[s] ? n, c; got = true
        :: empty(to_client[s]) -> got = false
        fi
    };
    if
    :: atomic { got ->
            assert(kept[of(s, n)] == 0);                        /* or it is an error of the server */
            kept[of(s, n)] = c; n = 0; c = 0 }
#ifdef LOSSES
    :: atomic { got -> let_go[of(s, n)] = true; untold[of(s, n)] = true; n = 0; c = 0 }
#endif
    :: !got -> skip
    fi
}

/* Lets go of one loan that no body holds. */
inline evict(s) {
    atomic {
        if
        :: kept[of(s, 0)] != 0 && pins[of(s, 0)] == 0 ->
            kept[of(s, 0)] = 0; let_go[of(s, 0)] = true; untold[of(s, 0)] = true
        :: kept[of(s, 1)] != 0 && pins[of(s, 1)] == 0 ->
            kept[of(s, 1)] = 0; let_go[of(s, 1)] = true; untold[of(s, 1)] = true
        :: else -> skip
        fi
    }
}

/* Has the loan's content if it is kept, and holds it. */
inline find(s, l, c) {
    atomic {
        c = kept[of(s, l)];
        if
        :: c != 0 -> pins[of(s, l)]++
        :: else -> skip
        fi
    }
}

/* A thread of the client, which asks, and asks again. */
proctype Thread(byte t) {
    byte l, s, asked, n, c, body, i;
    bool takes, again, got;
    {
    do
    :: asked < asks(t) ->
        asked++; takes = true; again = false;
        if
        :: l = 0
        :: l = 1
        fi;
ask:
        atomic {
            answer[t].status = Nothing;
#ifdef CRASHES
            s = (dead[0] -> 1 : 0);
#endif
            requests[s] ! t, l, takes
        };
        if
        :: answer[t].status == Lent ->
            assert(answer[t].loan == l);
            find(s, l, body);
            if
            :: body == 0 ->
                atomic { !reading[s] -> reading[s] = true };
                do
                :: find(s, l, body);
                    if
                    :: body != 0 -> break
                    :: body == 0 -> skip
                    fi;
                    read_one(s, n, c, got);
                    if
                    :: got -> skip
                    :: !got -> find(s, l, body); break
                    fi
                od;
                reading[s] = false
            :: body != 0 -> skip
            fi;
            if
            :: body != 0 -> skip
            :: body == 0 ->
                assert(let_go[of(s, l)]);       /* nothing else excuses it */
                give_back(s, i);
                assert(!again);                 /* or it is an error of the server */
                again = true;
                takes = false;
                goto ask
            fi;
            /* The segment is back; the body is read, however long that takes. */
            assert(body == content(s, l));
            if
            :: atomic { pins[of(s, l)]--; body = 0 }
#ifdef HOLDS
            :: atomic { asked == asks(t) -> body = 0 }
#endif
            fi
        :: answer[t].status == Found ->
            if
            :: answer[t].wanted ->
                atomic { !reading[s] -> reading[s] = true };
                do
                :: read_one(s, n, c, got);
                    if
                    :: got -> skip
                    :: !got -> break
                    fi
                od;
                reading[s] = false;
                evict(s);
                give_back(s, i)
            :: !answer[t].wanted -> skip
            fi
#ifdef CRASHES
        :: dead[s] && answer[t].status == Nothing -> goto ask   /* of the successor */
#endif
        :: atomic { asked == asks(t) -> break }                    /* given up: nobody reads the answer */
        fi
    :: asked == asks(t) -> break
    od;
    running--
    } until_orphaned
}

/* Another thread of the client, whose answers want room at any time. At the end, nothing is asked
   any more: what is on its way comes in. */
active proctype Evictor() {
    byte s, n, c, i;
    bool got;
    atomic {
        run Thread(0); run Thread(1);
        run Worker(0); run Hearer(0);
#ifdef CRASHES
        run Worker(1); run Hearer(1);   /* one worker each, or it would take hours */
#else
        run Worker(0);
#endif
    };
    {
    evict(s);
    give_back(s, i);
    running--;
    /* No request is under way. */
    running == 0 && timeout ->
    do
    :: nempty(to_client[s]) -> read_one(s, n, c, got)
    :: empty(to_client[s]) ->
        give_back(s, i);
        if
        :: s + 1 < SERVERS -> s++
        :: s + 1 == SERVERS -> break
        fi
    od;
    timeout ->
    s = 0;
    do
    :: s < SERVERS ->
        i = 0;
        do
        :: i < LOANS -> assert(dead[s] || lent[of(s, i)] == (kept[of(s, i)] != 0)); i++
        :: i == LOANS -> break
        od;
        s++
    :: s == SERVERS -> break
    od
    } until_orphaned
}
