#!/usr/bin/env bash
# wrk at shmferry-http, and at nginx that serves the same files itself: requests a second and their ratios, medians
# over rounds in which the two take turns. 64 connections that are kept alive; the cache lends. Needs nginx and wrk,
# and a machine that does nothing else.
#
#   ci/http-bench.sh [ROUNDS]       9 rounds of 2 s each by default, two minutes
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-9}
export PATH=$PATH:/usr/sbin
cargo build --locked --release --quiet -p shmferry-examples -p shmferry-http
programs=${CARGO_TARGET_DIR:-$PWD/target}/release
place=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$place"' EXIT
chmod 755 "$place"; mkdir "$place/files"
sizes=(1024 65536 1048576)
for size in "${sizes[@]}"; do head -c "$size" /dev/urandom >"$place/files/$size.bin"; done

"$programs/simplecached" -c "$place/files" --listen "unix:$place/cache.sock" 2>/dev/null &
"$programs/shmferry-http" --listen 127.0.0.1:25480 --cache "unix:$place/cache.sock" 2>/dev/null &
cat >"$place/nginx.conf" <<CONF
daemon off; worker_processes 2; pid $place/nginx.pid; error_log $place/nginx.log;
events { worker_connections 1024; }
http {
    access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000;
    open_file_cache max=100; open_file_cache_valid 60s;
    server { listen 127.0.0.1:25481; root $place/files; }
}
CONF
nginx -c "$place/nginx.conf" &
for port in 25480 25481; do
    until curl -sf -o /dev/null "http://127.0.0.1:$port/1024.bin"; do sleep 0.1; done
done

rate() { wrk -t 2 -c 64 -d 2s "http://127.0.0.1:$1/$2.bin" | awk '/Requests\/sec/ { print $2 } /Non-2xx|Socket errors/ { print > "/dev/stderr" }'; }
median() { sort -n | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'; }
# The files are older than two seconds by now, from when on they are lent.
sleep 2
for size in "${sizes[@]}"; do rate 25480 "$size" >/dev/null; done

sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1
echo
echo "| bytes | shmferry-http, requests/s | nginx, requests/s | ratio |"
echo "| ---: | ---: | ---: | ---: |"
for size in "${sizes[@]}"; do
    for round in $(seq "$rounds"); do
        if [ $((round % 2)) = 0 ]; then ours=$(rate 25480 "$size"); theirs=$(rate 25481 "$size")
        else theirs=$(rate 25481 "$size"); ours=$(rate 25480 "$size"); fi
        echo "$ours $theirs"
    done >"$place/rates"
    echo "| $size | $(cut -d' ' -f1 "$place/rates" | median) | $(cut -d' ' -f2 "$place/rates" | median) |" \
        "$(awk '{ print $1 / $2 }' "$place/rates" | median) |"
done
