#!/usr/bin/env bash
# A training run on a TPU slice in Google Kubernetes Engine, as a JobSet.
#     bash launch/gke_tpu.sh create | log | delete | print
# It needs kubectl, the JobSet controller (0.6 or newer), Kubernetes 1.26 or newer, a node pool of the
# slice, and a volume (NFS) that all hosts can write. GKE tells jax.distributed where the other hosts
# are. A host that fails makes the JobSet start all of them again, and the run resumes. `print` only
# prints what `create` asks for.
set -euo pipefail

# EDIT: where.
NAME=yocou             # small letters, digits and -
ACCELERATOR=tpu-v5-lite-podslice
TOPOLOGY=16x16         # the plan's topology: v5e:16x16
CHIPS=4                # per host
IMAGE=REGISTRY/yocou:latest   # has this repository in /yocou, with requirements-tpu.txt installed
CLAIM=yocou-runs       # the PersistentVolumeClaim of the volume, mounted at /mnt/runs
# EDIT: what. The workdir must be on storage that all hosts see.
TRAIN="--config=configs/yocou_1b.py --config.data.source='/mnt/runs/text/*.jsonl.gz'
  --config.data.cache_dir=/mnt/runs/cache
  --config.mesh.data=4 --config.mesh.fsdp=16 --config.mesh.context=4
  --config.optimizer.accumulation_steps=2"
TRAIN=${TRAIN//$'\n'/ }   # one line

if [[ ! $TOPOLOGY =~ ^[0-9]+(x[0-9]+)*$ ]] || ((${TOPOLOGY//x/*} % CHIPS)); then
  echo "TOPOLOGY=$TOPOLOGY is not a whole number of hosts with CHIPS=$CHIPS chips each." >&2
  exit 2
fi
HOSTS=$((${TOPOLOGY//x/*} / CHIPS))

jobset() { cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "$NAME"
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    # An error that comes back at each start ends the run after 10 restarts. Preemptions and maintenance
    # may interrupt a long run more often, so they do not count: podFailurePolicy, below, gives them a
    # reason of their own. A host that dies without a signal counts: the others then end with code 69,
    # as they do if one host has an error.
    maxRestarts: 10
    rules:
      - name: preemptions
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: train
      replicas: 1
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          podFailurePolicy:
            rules:
              # The host that Kubernetes takes away.
              - action: FailJob
                onPodConditions:
                  - {type: DisruptionTarget, status: "True"}
              # The other hosts: SIGTERM on one makes all save a checkpoint and end with code 75. They
              # may end before that host does, and the first that ends decides the reason.
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [75]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300   # to save a checkpoint; spot machines give 30
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
              containers:
                - name: train
                  image: $IMAGE
                  workingDir: /yocou
                  # exec: SIGTERM reaches Python, and its exit code is that of the container.
                  command:
                    - bash
                    - -c
                    - >-
                      exec python -m experiments.train --distributed $TRAIN
                      --workdir=/mnt/runs/$NAME
                  resources:
                    requests: {google.com/tpu: $CHIPS}
                    limits: {google.com/tpu: $CHIPS}
                  volumeMounts:
                    - {name: runs, mountPath: /mnt/runs}
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: $CLAIM
YAML
}

case "${1:-}" in
  create) jobset | kubectl apply -f - ;;  # after `delete`, it resumes
  log) kubectl logs --tail=5 -l "jobset.sigs.k8s.io/jobset-name=$NAME" ;;
  delete) kubectl delete jobset "$NAME" ;;
  print) jobset ;;
  *) sed -n 2,3p "$0"; exit 2 ;;
esac
