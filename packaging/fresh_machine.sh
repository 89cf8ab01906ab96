#!/usr/bin/env bash
# A machine that has never seen the project: an empty environment, no cache, no network once installed, HOME read-only.
# Prints the seconds of every step; fails at the first that does not hold. Usage: packaging/fresh_machine.sh [FOLDER]
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
place=${1:-$(mktemp -d)}
python=${PYTHON:-python3}
mkdir -p "$place"
cd "$place"
export HOME="$place/home" ACTSPARSE_HOME="" HF_HOME="$place/home/hf"
unset ACTSPARSE_HOME PYTHONPATH
mkdir -p "$HOME"

sealed="$place/sealed"
trap 'umount "$sealed" 2> /dev/null || true' EXIT

step() { # step NAME COMMAND...: run it, quietly, and say how long it took
  local name=$1 began=$SECONDS
  shift
  if ! "$@" > "$place/last.log" 2>&1; then
    printf 'FAILED  %s\n' "$name"
    tail -20 "$place/last.log"
    exit 1
  fi
  printf '%8d s  %s\n' "$((SECONDS - began))" "$name"
}

# sitecustomize of an environment without network: every socket that is not local is refused
blocked="$place/blocked"
mkdir -p "$blocked"
cat > "$blocked/sitecustomize.py" <<'PY'
import socket

def refused(self, address, *rest):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        raise OSError("the network is off")
    return connect(self, address, *rest)

connect = socket.socket.connect
socket.socket.connect = refused
socket.getaddrinfo = lambda *a, **k: (_ for _ in ()).throw(OSError("the network is off"))
PY

short="-n 8 --timing-pairs 1 --probes none"
demo() { # demo ENVIRONMENT [OPTION...]: a run whose answer is one JSON document
  local environment=$1
  shift
  "$environment/bin/actsparse" run --model demo --json --force "$@" | "$environment/bin/python" -m json.tool > "$place/answer.json"
}
offline() { PYTHONPATH="$blocked" demo "$1" $short; }
isolated() { # in a network namespace of its own
  unshare -n "$1/bin/actsparse" run --model demo --json --force $short | "$1/bin/python" -m json.tool > "$place/answer.json"
}
readonly_home() {
  # a disk of its own, since no mode of a folder stops the super-user; else the system's own read-only one
  local home=$sealed
  mkdir -p "$sealed"
  mount -t tmpfs -o ro tmpfs "$sealed" 2> /dev/null || home=/sys
  HOME=$home HF_HOME=$home/hf PYTHONPATH="$blocked" demo "$1" $short
}

mkdir "$place/source"
tar -C "$repository" --exclude=./.venv --exclude=./build --exclude=./dist --exclude=./runs --exclude=./.git -cf - . | tar -C "$place/source" -xf -
step "an empty environment" "$python" -m venv "$place/first"
step "pip install -c constraints.txt ." "$place/first/bin/pip" install -q --no-cache-dir -c "$place/source/constraints.txt" "$place/source"
step "actsparse --help" "$place/first/bin/actsparse" --help
step "actsparse run --model demo --json | python -m json.tool" demo "$place/first"
step "the same again, without network (sockets refused)" offline "$place/first"
if unshare -n true 2> /dev/null; then
  step "the same again, without network (a namespace)" isolated "$place/first"
else
  printf '%10s  %s\n' skipped "the same again, without network (a namespace): unshare -n is not allowed here"
fi
step "the same again, HOME read-only" readonly_home "$place/first"
step "pip install build" "$place/first/bin/pip" install -q -c "$place/source/constraints.txt" build hatchling
step "wheel and sdist" "$place/first/bin/python" -m build --no-isolation --outdir "$place/dist" "$place/source"
for kind in whl tar.gz; do
  step "an environment for the $kind, with the packages of the first" "$python" -m venv "$place/$kind"
  site=$("$place/$kind/bin/python" -c 'import site; print(site.getsitepackages()[0])')
  "$place/first/bin/python" -c 'import site; print(site.getsitepackages()[0])' > "$site/first.pth"
  step "pip install the $kind" "$place/$kind/bin/pip" install -q --no-deps --no-build-isolation --force-reinstall "$place"/dist/*."$kind"
  step "the $kind is what is imported" "$place/$kind/bin/python" -c "import actsparse, sys; assert actsparse.__file__.startswith('$site'), actsparse.__file__"
  step "run --model demo from the $kind" demo "$place/$kind" $short
done
