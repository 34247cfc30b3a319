#!/bin/bash
# Some machines pack one corpus into one folder, on a disk that all of them see:
#   pack-over-ssh.sh "node1 node2 node3" /data/corpus /data/packed
# Ctrl-C here ends all of them cleanly; the same command goes on.
set -eu
hosts="$1" corpus="$2" out="$3"

pids=""
trap 'kill $pids 2>/dev/null || true' INT TERM
for host in $hosts; do
    # -tt: when ssh ends, so does what it started.
    ssh -tt -o BatchMode=yes "$host" millstream pack "$(printf %q "$corpus")" --out "$(printf %q "$out")" --join --eos \
        </dev/null 2>&1 | sed "s/^/$host: /" &
    pids="$pids $!"
done

failed=0
for pid in $pids; do
    wait "$pid" || failed=1
done
# What counts is the run: the others go on without a machine that has failed.
test -e "$out/manifest.json" || exit 1
test "$failed" = 0 || echo "a machine has failed; the run is finished all the same" >&2
