#!/bin/sh
# Everything that needs a GPU: build, tests, benchmarks. Each part takes under eight minutes; name some to run only those.
#
#   sh benchmarks/gpu_check.sh [--force] [--quick] [--results DIR] [PART ...]
#
# Parts, in order:
#   build tests sanitizer                                  the extension, the tests that need a GPU, compute-sanitizer on small cases
#   align-sizes align-cases align-widths product tune      the relation loss, its product, cuts of its pair kernel
#   residual advantage attention                           the other operations; every attention backend
#   step memory model model-long model-ltx model-cogvideox the sandbox's step, the memory model, real models at real sizes
#   sandbox sandbox-end                                    train the sandbox's generator further: a slice (again: goes on), the last one
#
# Results: DIR/<device>/<part>.json (default benchmarks/results), each beside its log. A part whose JSON is of this very
# commit is skipped, unless --force. The last lines sum up. Exit code 1 if a part failed.
#
#   PYTHON=...          an interpreter with ldo's packages (default .venv/bin/python if it is there, else python3)
#   LDO_COMMIT=...      names the commit in a copy of the tree that has no .git
#   LDO_ALLOW_CPU=1     try the script itself without a GPU: tiny sizes
set -u
cd "$(dirname "$0")/.." || exit 2
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH="$PWD:$PWD/tests:$PWD/tests/kernels${PYTHONPATH:+:$PYTHONPATH}"
ALL="build tests sanitizer align-sizes align-cases align-widths product tune residual advantage attention step memory"
ALL="$ALL model model-long model-ltx model-cogvideox sandbox sandbox-end"
force='' quick='' results=benchmarks/results parts=''
while [ $# -gt 0 ]; do
    case $1 in
    --force) force=1 ;;
    --quick) quick=--quick ;;
    --results)
        [ $# -gt 1 ] || { echo "--results needs a folder" >&2; exit 2; }
        shift
        results=$1
        ;;
    -*) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    *)
        case " $ALL " in
        *" $1 "*) parts="$parts $1" ;;
        *) echo "unknown part $1; one of: $ALL" >&2; exit 2 ;;
        esac
        ;;
    esac
    shift
done
parts=${parts:-$ALL}

# One line: the folder's name, the commit, cuda or cpu.
about=$("$PYTHON" -c '
import torch
from benchmarks import common
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print(common.slug(device), common.commit() or "unknown", device.type)') || exit 2
slug=${about%% *} kind=${about##* } commit=${about#* }
commit=${commit% *}
if [ "$kind" = cuda ]; then
    unset TRITON_INTERPRET # kernels run natively here
elif [ "${LDO_ALLOW_CPU:-0}" != 1 ]; then
    echo "no GPU here (LDO_ALLOW_CPU=1 tries the script itself with tiny sizes)" >&2
    exit 2
fi
tiny=''
[ "$kind" = cuda ] || { tiny=1 quick=--quick; }
folder=$results/$slug
mkdir -p "$folder" || exit 2
echo "$slug, commit $commit, parts:$(printf ' %s' $parts)"

status=0 made=''
has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(not all(u.find_spec(n) for n in sys.argv[1:]))" "$@"; }
# models PART: are the model libraries here? If not, PART is left out.
models() {
    has diffusers av && return
    echo "== $1: left out, diffusers or av is not installed"
    return 1
}
# The trainer's own fixtures need the model libraries; the operations need torch alone.
cut='--confcutdir=tests/ops'
if has diffusers av; then cut=''; fi

# Is FILE a result of this commit? A tree that differs from its commit, or has none, never counts.
fresh() {
    case $commit in *-dirty | unknown) return 1 ;; esac
    [ -z "$force" ] && [ -f "$1" ] && grep -q "\"commit\": \"$commit\"" "$1"
}

# logged NAME SECONDS COMMAND...: run under a time limit, output to the log and the terminal.
logged() {
    name=$1 limit=$2
    shift 2
    began=$(date +%s)
    { timeout "$limit" "$@" 2>&1; echo $? >"$folder/.code"; } | tee "$folder/$name.log"
    code=$(cat "$folder/.code")
    rm -f "$folder/.code"
    echo "== $name: exit $code after $(($(date +%s) - began)) s"
    return "$code"
}

# bench NAME SCRIPT ARGUMENTS...: its JSON is moved into place only if it ran to the end.
bench() {
    name=$1 script=benchmarks/$2
    shift 2
    out=$folder/$name.json
    if [ ! -f "$script" ]; then
        echo "== $name: no $script yet"
        return
    fi
    made="$made $out"
    if fresh "$out"; then
        echo "== $name: done for this commit"
        return
    fi
    if logged "$name" 470 "$PYTHON" "$script" $quick --out "$folder/$name.part.json" "$@"; then
        mv "$folder/$name.part.json" "$out"
        [ ! -f "$folder/$name.part.png" ] || mv "$folder/$name.part.png" "$folder/$name.png"
    else
        status=1
        made="${made% *} $folder/$name.part.json" # the rows there are
    fi
}

# further NAME ARGUMENTS...: the further training of the sandbox's generator.
further() {
    name=$1
    shift
    logged "$name" 470 "$PYTHON" -m ldo.sandbox.build.further "$@"
}

# pick TINY QUICK FULL: the arguments that suit this run.
pick() {
    if [ -n "$tiny" ]; then echo "$1"; elif [ -n "$quick" ]; then echo "$2"; else echo "$3"; fi
}

run() {
    case $1 in
    build)
        if logged build 470 "$PYTHON" setup.py build_ext; then :; else
            echo "the extension did not build; what needs it is left out"
            status=1
        fi
        ;;
    tests)
        tests='tests/ops'
        if [ -d tests/kernels ] && [ -z "$tiny" ]; then tests='tests/kernels tests/ops'; fi
        logged tests 400 "$PYTHON" -m pytest $cut $tests || status=1
        if [ -z "$cut" ]; then
            logged tests-gpu 70 "$PYTHON" -m pytest -m gpu --ignore tests/kernels --ignore tests/ops || [ "$code" -eq 5 ] || status=1 # 5: none marked
        fi
        ;;
    sanitizer)
        if [ -n "$tiny" ] || ! command -v compute-sanitizer >/dev/null; then
            echo "== sanitizer: left out, no compute-sanitizer for a GPU here"
        else # the extension's kernels on groups of every size; a machine that does not let it in says so at once
            logged sanitizer 400 compute-sanitizer --error-exitcode 99 "$PYTHON" -m pytest $cut tests/ops/test_native.py -m gpu -k "same_bits and float32" || status=1
        fi
        ;;
    align-sizes) bench align-sizes bench_align.py $(pick '--sizes 256,512 --widths 64x48' '--sizes 8192' '--sizes 3600,4096,8192,10240,16384,23040,32768') ;;
    align-cases)
        bench align-cases bench_align.py $(pick '--sizes 256 --widths 64x48 --cases many,squared,framed' '--sizes 16384 --cases squared,framed' \
            '--sizes 8192,16384,32768 --cases many,squared,framed')
        ;;
    align-widths)
        bench align-widths bench_align.py $(pick '--sizes 256 --widths 48x32' '--sizes 4096 --widths 1536x1024' \
            '--sizes 4096,10240 --widths 1536x1024,3072x1024,5120x1408')
        ;;
    product | tune)
        [ -z "$tiny" ] || export TRITON_INTERPRET=1
        case $1 in
        product) bench product bench_product.py $(pick '--sizes 33 --widths 16x8' '' '') ;;
        tune) bench tune tune_pairs.py $(pick '--sizes 65 --widths 16x12 --minutes 0.5' '--minutes 2' '--minutes 6') ;;
        esac
        [ -z "$tiny" ] || unset TRITON_INTERPRET
        ;;
    residual) bench residual bench_residual.py $(pick '--sizes 1568 --widths 64' '' '') ;;
    advantage) bench advantage bench_advantage.py ;;
    attention) models attention && bench attention bench_attention.py ;;
    step)
        models step && bench step bench_step.py $(pick 'recipes/sandbox.yaml align.batch=4 rl.prompts=2 rl.group_size=2 rl.steps=4' '' '')
        ;;
    memory) models memory && bench memory bench_memory.py ;;
    model | model-*) # a real model's step in its published configuration, random weights
        one='rl.micro_batch=1 rl.group_size=2 align.micro_batch=1 align.batch=2'
        case $1 in
        model) recipe=wan2.1-1.3b size='' ;;
        model-long) recipe=wan2.1-1.3b size="data.frames=81 data.height=480 data.width=832 $one rl.steps=6 rl.window=2 rl.window_range=2" ;;
        model-ltx) recipe=ltx-video size='' ;;
        model-cogvideox) recipe=cogvideox-2b size='rl.group_size=2 rl.steps=8' ;;
        esac
        models "$1" && bench "$1" bench_model.py $(pick 'recipes/sandbox.yaml rl.group_size=2 align.batch=2' "recipes/$recipe.yaml $size" "recipes/$recipe.yaml $size")
        ;;
    sandbox | sandbox-end) # its training stays in runs/sandbox-further, some 21 MiB, and is what goes on elsewhere
        models "$1" || return
        decay=''
        [ "$1" = sandbox ] || decay=--decay
        for form in $(pick eager 'compiled graph eager' 'compiled graph eager'); do
            further "$1" $(pick '--clips 8 --batch 2 --warmup 3 --minutes 0.3' '--minutes 2' '--minutes 5') $decay --form "$form" && break
        done || status=1
        [ "$code" -eq 0 ] && [ -n "$decay" ] || return
        further sandbox-write --write runs/sandbox-further-wan && logged sandbox-quality 400 "$PYTHON" -m ldo.sandbox.build.quality \
            runs/sandbox-further-wan --out "$folder/sandbox.json" $(pick '--loss-clips 4 --sound-clips 2 --prompts 2' '' '') || status=1
        ;;
    esac
}

for part in $parts; do run "$part"; done
echo
for file in $made; do [ ! -f "$file" ] || "$PYTHON" benchmarks/show.py "$file"; done
[ -n "$tiny" ] || "$PYTHON" benchmarks/goals.py "$folder"
[ "$status" -eq 0 ] && echo "all parts passed" || echo "SOME PARTS FAILED"
exit "$status"
