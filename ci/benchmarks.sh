#!/usr/bin/env bash
# Measures everything that the documents give figures of, and writes them: docs/benchmarks.md, concurrency.md,
# control.md, calls.md (with strace), programs.md and their plots. Some minutes, on a machine that does nothing else.
# The tables of loans alone, printed and not written (add `--rounds 1` for a look):
#     cargo bench --bench transfer -- --only lent --only kept --only streamed                    # half a minute
#     cargo bench --bench concurrency -- --only lent --only kept --only "shmferry, socket"       # two minutes
set -euo pipefail
cd "$(dirname "$0")/.."

# The transfer bench with other crates beside, a minute; without them, `cargo bench --bench transfer`.
cargo bench --locked --manifest-path benches/peers/Cargo.toml -- --write ../../docs
cargo bench --locked --bench concurrency -- --write docs # three minutes
cargo bench --locked --bench control -- --write docs
cargo bench --locked --bench calls -- --write docs

# Whole programs, by getfile's own bench.
cargo build --locked --release
programs=$PWD/target/release
place=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$place"' EXIT
mkdir "$place/files"
for size in 1024 1048576 104857600; do head -c $size /dev/urandom >"$place/files/$size"; done
"$programs/simplecached" -c "$place/files" --listen "unix:$place/cache.sock" 2>/dev/null &
"$programs/webproxy" -p 25388 --cache "unix:$place/cache.sock" 2>/dev/null &
"$programs/webproxy" -p 25389 -z 2097152 --slots 8 --cache "unix:$place/cache.sock" 2>/dev/null &
for port in 25388 25389; do
    until "$programs/getfile" -p $port -o "$place/there" /1024 >/dev/null 2>&1; do sleep 0.1; done
done
ask() { # PORT WHAT BYTES CLIENTS REQUESTS
    echo "/$3" >"$place/workload"
    printf '\n### %s bytes, %s clients, %s\n\n```text\n' "$3" "$4" "$2"
    "$programs/getfile" bench -p "$1" -w "$place/workload" -t "$4" -r "$5" --against-unix "$place/files"
    printf '```\n'
}
{
    printf '# Whole programs\n\n'
    printf 'For users who compare speeds.\n\n'
    printf 'Written by `ci/benchmarks.sh`, from one run: GETFILE through webproxy and simplecached, in\n'
    printf 'three rounds that alternate with a plain read-and-write copy over one Unix socket, which has one hop and one\n'
    printf 'process fewer. Clients, proxy and cache share the machine.\n'
    cat <<'TEXT'

## What the programs lend
Files that are asked for again are lent: `simplecached`, and `webproxy --root`, copy them once into sealed memory, and
`webproxy` sends them from there to its clients: by `sendfile` to other machines. The first answer, and answers over `mq:/NAME`, go
through a segment.

| flag | of | meaning | default |
| --- | --- | --- | --- |
| `--loan-budget BYTES` | simplecached, webproxy `--root` | copies of files that are asked for again, in all; 0 for none | 256 MiB, at most an eighth of the memory available |
| `--loan-files` | simplecached | lend read-only descriptors of the files that are not among those copies | off |
| `--mapped BYTES` | webproxy | loans of simplecached kept mapped, 256 at most; 0 takes no loans | 512 MiB |

A file that changes is served as it is now from the next request on. A request under way sees one version, whole, if it
is answered from a copy; through a segment or from a lent file, it sees the file as it is when it is read. Not copied:
those below 4 KiB, those larger than nearly all of the budget, those just written to, procfs, FUSE, network file systems.
The budget bounds what the cache itself keeps. A proxy keeps what it was lent, up to `--mapped`, also after the cache has
dropped it: memory in use is at most the budget and `--mapped` of each proxy together.
At their end, both programs tell how many of their `hits` were `lent` and how many `streamed`, and their `bytes`;
simplecached also how many files it has `copied`.

## What keys ask for
A key is a path. What follows a NUL, which no path holds, asks for something else than all of the file; only the
[web server](http.md) does.

| key | answer |
| --- | --- |
| `PATH` | the file |
| `PATH`, NUL, `head` | no bytes |
| `PATH`, NUL, `bytes=5-9` or `bytes=5-` or `bytes=-5` | that part; if the file has no such part, the refusal 416 |
| `PATH/`, NUL, `list` | the regular files and directories in that directory, sorted: `f` or `d`, the length, a blank, the name, a NUL; only of a directory that is served |

Beside each answer from a file, and the refusal 416, goes metadata, as four little-endian numbers of 64 bits: the length of
the whole file (all ones: unknown), the first byte that follows, the modification time in seconds, and the version, which is
another one once the file has changed (0: too new to tell). A part of a file that is lent is lent.
TEXT
    for run in "1024 4 20000" "1024 64 20000" "1048576 4 1000" "1048576 64 1000" "104857600 4 24" "104857600 64 64"; do
        ask 25388 "webproxy as it comes" $run
    done
    for run in "1048576 64 1000" "104857600 4 24" "104857600 64 64"; do
        ask 25389 "webproxy with \`-z 2097152 --slots 8\`" $run
    done
    printf '\n### Most memory resident, segments included\n\n```text\n'
    for pid in $(jobs -p); do
        printf '%s: %s\n' "$(tr '\0' ' ' <"/proc/$pid/cmdline" | sed "s|$place/||g; s|.*/||")" "$(grep VmHWM "/proc/$pid/status" | tr -s '\t ' ' ')"
    done
    printf '```\n'
} >docs/programs.md
