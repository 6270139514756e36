#!/usr/bin/env bash
# Training on several machines: start this on each of them, with the same arguments. No queue needed.
#
#     NODES=2 HEAD=node0:29500 configs/launch/torchrun.sh --config configs/0.6b.yaml \
#         --config configs/launch/fsdp2.yaml --run_dir /shared/runs/0.6b
#
# NODES: machines (1). HEAD: name and port of one of them (localhost:29500). PROCESSES: per machine (one for each GPU).
# The run directory lies on a file system that all machines share. A run that was stopped goes on, by the same command.
set -euo pipefail
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES:-gpu}" --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:-localhost:29500}" --no-python attnres-train fit "$@" \
    --trainer.num_nodes "${NODES:-1}" --trainer.devices "${PROCESSES:-auto}" --ckpt_path last
