#!/usr/bin/env bash
# Asks for a Cloud TPU pod slice as a queued resource, and starts a training run on all its hosts.
#     bash launch/tpu_pod.sh create | start | log | delete
# It needs gcloud, a project with TPU quota, and a Filestore share (NFS) in the same network.
# (A bucket mounted with gcsfuse renames folders only with special settings; checkpoints need it.)
set -euo pipefail

# EDIT: where.
ZONE=us-west4-a
NAME=yocou
TYPE=v5litepod-256     # the plan's topology: v5e:16x16
RUNTIME=v2-alpha-tpuv5-lite
# EDIT: what. The workdir must be on storage that all hosts see.
REPOSITORY=https://github.com/YOUR_NAME/yocou-jax
SHARE=10.0.0.2:/runs   # mounted at /mnt/runs
PYTHON=python3.11      # the image may have an older one: install it first
TRAIN="--config=configs/yocou_1b.py --config.data.source='/mnt/runs/text/*.jsonl.gz'
  --config.data.cache_dir=/mnt/runs/cache
  --config.mesh.data=4 --config.mesh.fsdp=16 --config.mesh.context=4
  --config.optimizer.accumulation_steps=2"
TRAIN=${TRAIN//$'\n'/ }   # one line

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
      make setup PYTHON=$PYTHON REQUIREMENTS=requirements-tpu.txt
      sudo mkdir -p /mnt/runs && (mountpoint -q /mnt/runs || sudo mount -t nfs $SHARE /mnt/runs)
      sudo chmod go+rw /mnt/runs
      nohup .venv/bin/python -m experiments.train --distributed $TRAIN \
        --workdir=/mnt/runs/$NAME > train.log 2>&1 &"
    ;;
  log) on_all_hosts "tail -n 5 yocou/train.log" ;;
  delete) gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force ;;
  *) sed -n 2,5p "$0"; exit 2 ;;
esac
