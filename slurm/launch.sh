# shellcheck shell=bash
# The jobs in this folder source this file: it sets the Python, the launcher and the folder for results.
#
#   PYTHON     the Python of the environment that hpccomm is installed in      default: python
#   LAUNCHER   run: hpccomm-run, which finds the launcher of the MPI that mpi4py loads (default)
#              srun: Slurm's own, with --mpi=$SRUN_MPI                          default: pmi2 (MPICH, Intel MPI); pmix for Open MPI
#   RESULTS    a folder that the job's first node can write to                  default: results-<job>
#
# A wrong --mpi silently starts many jobs of one rank.  hpccomm compares the launcher's number of ranks with the
# communicator's, and ends such a job with an error that says which flag to give.

PYTHON=${PYTHON:-python}
RESULTS=${RESULTS:-results-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
mkdir -p "$RESULTS"

# Each rank sees one GPU: the one with the number of its local rank.
bind_gpu() {
    if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
        # shellcheck disable=SC2016
        printf '%s\n' bash -c 'export CUDA_VISIBLE_DEVICES=$(( ${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-${SLURM_LOCALID:-0}}} % SLURM_GPUS_ON_NODE )); exec "$@"' bind
    fi
}

# launch RANKS MODULE-OR-SCRIPT ARGUMENT...      e.g. launch 8 -m hpccomm info
launch() {
    local ranks=$1
    shift
    mapfile -t bound < <(bind_gpu)
    case "${LAUNCHER:-run}" in
        srun) ${RUN:-} srun --mpi="${SRUN_MPI:-pmi2}" -n "$ranks" "${bound[@]}" "$PYTHON" -m mpi4py "$@" ;;
        run) ${RUN:-} "$(dirname "$(command -v "$PYTHON")")/hpccomm-run" -n "$ranks" "${bound[@]}" "$PYTHON" -m mpi4py "$@" ;;
        *)
            echo "LAUNCHER=$LAUNCHER: take run or srun" >&2
            return 2
            ;;
    esac
}

# As launch, but passes the signal USR1 on to all ranks.  They save a checkpoint and end; then the job is queued again.
interruptible() {
    local status=0
    (RUN="exec" launch "$@") &
    child=$!
    trap 'signalled=yes; kill -USR1 "$child"' USR1
    while :; do # a signal interrupts wait, not the program
        wait "$child" && status=0 || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    if [ -n "${signalled:-}" ]; then
        echo "received USR1: the job is queued again"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60 # until Slurm ends this script
    fi
    return "$status"
}
