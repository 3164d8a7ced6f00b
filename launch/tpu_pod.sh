#!/usr/bin/env bash
# Asks for a Cloud TPU pod slice as a queued resource, and starts a training run on all its hosts.
#     bash launch/tpu_pod.sh create | start | log | delete
# It needs gcloud, a project with TPU quota, and a bucket that the TPU may write.
set -euo pipefail

# EDIT: where.
ZONE=us-west4-a
NAME=yocou
TYPE=v5litepod-256     # the plan's topology: v5e:16x16
RUNTIME=v2-alpha-tpuv5-lite
# EDIT: what. The workdir must be on storage that all hosts see.
REPOSITORY=https://github.com/YOUR_NAME/yocou-jax
MOUNT=gs-bucket-name   # mounted at /mnt/runs with gcsfuse
TRAIN="--config=configs/yocou_1b.py --config.mesh.fsdp=64 --config.mesh.context=4 --config.optimizer.accumulation_steps=2"

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
  create)
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
      --accelerator-type="$TYPE" --runtime-version="$RUNTIME"
    ;;
  start)  # again after a failure: it resumes
    on_all_hosts "
      set -e
      test -d yocou || git clone --quiet $REPOSITORY yocou
      cd yocou
      make setup REQUIREMENTS=requirements-tpu.txt
      sudo mkdir -p /mnt/runs && (mountpoint -q /mnt/runs || sudo gcsfuse --implicit-dirs -o allow_other $MOUNT /mnt/runs)
      nohup .venv/bin/python -m experiments.train --distributed $TRAIN \
        --workdir=/mnt/runs/$NAME > train.log 2>&1 &"
    ;;
  log) on_all_hosts "tail -n 5 yocou/train.log" ;;
  delete) gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force ;;
  *) sed -n 2,4p "$0"; exit 2 ;;
esac
