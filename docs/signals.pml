/*
 * Signals for tasks as a model: a process whose tasks wait without a thread, and one that posts for
 * them. `ci/model.sh` checks it with spin.
 *
 * The rule is P11 of protocol.md. A permit is a number, and a transfer's end is poison. Steps are seen
 * in the order in which they are made: fences are for loom.
 *
 * Checked in every interleaving:
 *   - no task sleeps for ever while it has something to take, or its wait is over;
 *   - one posting thread sends one signal at most for each question;
 *   - nobody waits for ever.
 *
 * -DPOSTERS=2   two threads post, each for one of the tasks; otherwise one for both
 * -DPOSTS=n     how many permits are posted for each task; 1 unless said
 * -DOTHERS      other messages come over the same connection, and can fill it
 * -DREADERS     a thread that looks for something else reads the connection, too
 * -DENDS        transfers end with poison, for one permit that is still to come
 * -DHANGUPS     the connection may end at any step
 */

#define TASKS    2
#ifndef POSTERS
#define POSTERS  1
#endif
#define ROOM     1
#ifndef POSTS
#define POSTS    1
#endif
#ifdef ENDS
#define WANTED   (POSTS + 1)
#else
#define WANTED   POSTS
#endif

/* Of each task's transfer, in shared memory. */
byte permits[TASKS];
bool poison[TASKS];

/* The word of asking, in shared memory, and the numbers used. */
byte word, asked;

/* The link of the process with the tasks. */
bool locked, has_asked, severed;
bool waker[TASKS], woken[TASKS];

chan line = [ROOM] of { bit };
byte signals;

#define is_settled(t)  (permits[t] > 0 || poison[t])

inline acquire() { atomic { !locked -> locked = true } }
inline release() { locked = false }

inline ask() {
    asked++;
    word = asked
}

/* Wakes the tasks that have something to take. */
inline wake_ready(i) {
    for (i : 0 .. TASKS - 1) {
        atomic {
            if
            :: waker[i] && is_settled(i) -> waker[i] = false; woken[i] = true
            :: else
            fi
        }
    }
}

inline look(i) {
    acquire();
    if
    :: has_asked ->
        wake_ready(i);
        has_asked = waker[0] || waker[1];
        if
        :: has_asked -> ask(); wake_ready(i)
        :: else
        fi
    :: else
    fi;
    release()
}

/* Reads the other's word, and signals. */
inline signal(n) {
    n = word;
    if
    :: n != 0 ->
        if
        :: atomic { nfull(line) -> line ! 1; signals++; assert(signals <= asked * POSTERS) }
        :: full(line)
        fi;
        atomic {
            if
            :: word == n -> word = 0
            :: else
            fi
        }
    :: else
    fi
}

proctype Task(byte t) {
    byte taken = 0;
again:
    do
    :: atomic { permits[t] > 0 -> permits[t]--; taken++ };
        if
        :: taken == WANTED -> goto over
        :: else
        fi
    :: atomic { permits[t] == 0 && poison[t] -> goto over }
    :: atomic { !is_settled(t) -> break }
    od;
    acquire();
    waker[t] = true;
    if
    :: !has_asked -> has_asked = true; ask()
    :: else
    fi;
    release();
    if
    :: is_settled(t) || severed -> goto try_over
    :: else
    fi;
    atomic { woken[t] -> woken[t] = false };
    goto again;
try_over:
    if
    :: !is_settled(t) && severed -> goto over
    :: else -> goto again
    fi;
over:
    skip
}

#define is_mine(t)  (POSTERS == 1 || t == p)

proctype Poster(byte p) {
    byte n, t, k;
    for (k : 1 .. POSTS) {
        for (t : 0 .. TASKS - 1) {
            if
            :: is_mine(t) -> permits[t]++; signal(n)
            :: else
            fi
        }
    };
#ifdef ENDS
    for (t : 0 .. TASKS - 1) {
        if
        :: is_mine(t) -> poison[t] = true; signal(n)
        :: else
        fi
    }
#endif
}

proctype Attendant() {
    byte i;
end:
    do
    :: line ? _ -> look(i)
    od
}

#ifdef READERS
proctype Reader() {
    byte i;
    if
    :: line ? _ -> look(i)
    :: empty(line)
    fi
}
#endif

#ifdef OTHERS
proctype Other() {
    byte k;
    for (k : 1 .. 2) {
        if
        :: nfull(line) -> line ! 0
        :: full(line)
        fi
    }
}
#endif

#ifdef HANGUPS
proctype Watcher() {
    byte i;
    acquire();
    severed = true;
    for (i : 0 .. TASKS - 1) {
        poison[i] = true;
        if
        :: waker[i] -> atomic { waker[i] = false; woken[i] = true }
        :: else
        fi
    };
    release()
}
#endif

init {
    atomic {
        run Task(0); run Task(1);
        run Poster(0);
#if POSTERS == 2
        run Poster(1);
#endif
       
        run Attendant();
#ifdef READERS
        run Reader();
#endif
#ifdef OTHERS
        run Other();
#endif
#ifdef HANGUPS
        run Watcher();
#endif
    }
}
