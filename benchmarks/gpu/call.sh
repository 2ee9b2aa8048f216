#!/bin/bash
# One call on a bare machine: bash benchmarks/gpu/call.sh NUMBER, in the repository's root.
# Installs the wheels in .whl, runs what README.md says of that number, writes to $OUT.
# DRY=1 tries it without a card. A step that hangs is ended, and the next one runs.
set -u
export OUT=${OUT:-build/gpu} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$OUT"
here=benchmarks/gpu
python=${PYTHON:-python3}
site=${SITE:-/tmp/site}
if compgen -G '.whl/*.whl' >/dev/null; then
    $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" .whl/*.whl || exit
fi
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

run() { # SECONDS NAME COMMAND…
    local limit=$1 name=$2 started=$SECONDS
    shift 2
    echo "== $name"
    timeout "$limit" "$python" "$@" 2>&1 | tee "$OUT/$name.log"
    echo "== $name: exit code ${PIPESTATUS[0]} after $((SECONDS - started)) s"
}
if [ -n "${DRY:-}" ]; then
    script=--dry
    card=(--shape T --device cpu --random --requests 8 --rounds 1 --kv-memory 0.1 --force)
    worker=(--shape T --device cpu --requests 8 --rounds 1 --kv-memory 0.1 --force)
else
    script='' card=(--device cuda --rounds 1 --patience 1 --force --max-batch 1024 --budget 8192)
    worker=("${card[@]}" --shape L --requests 1024 --rounds 2 --limit 120)
fi

case ${1:-} in
1)
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    run 300 kernels $here/kernels.py $script
    run 270 decode $here/decode.py --shape 8B $script
    ;;
2)
    run 330 figure-8B $here/figure.py $script
    run 120 figure-samples $here/figure.py --shape L --requests 128 --samples 64 \
        --temperature 1 --profile 16 $script
    run 110 figure-ungrouped $here/figure.py --shape L --requests 128 --samples 64 \
        --temperature 1 --profile 0 --rounds 1 --groups 0 $script
    ;;
3)
    run 560 peers benchmarks/engine.py --shape L --workload W1 --requests 1024 --limit 170 \
        --profile 64 --engines nightherd,transformers-cb,transformers "${card[@]}"
    ;;
4)
    run 560 worker benchmarks/engine.py --workload W1 --engines nightherd,nightherd-worker \
        "${worker[@]}"
    ;;
5)
    run 560 peers-8B benchmarks/engine.py --shape 8B --workload fixed --requests 1024 --limit 250 \
        --profile 64 --engines nightherd,transformers-cb "${card[@]}"
    ;;
*)
    echo 'give the number of a call, 1 to 5: see benchmarks/gpu/README.md' >&2
    exit 2
    ;;
esac
