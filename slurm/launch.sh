# Sourced by the jobs beside it: which Python, which launcher, where results go.
#
#   PYTHON     the Python of the environment that hpccomm is installed in      default: python
#   LAUNCHER   run: hpccomm-run, which finds the launcher of the MPI that mpi4py loads (default)
#              srun: Slurm's own, with --mpi=$SRUN_MPI                          default: pmi2 (MPICH, Intel MPI); pmix for Open MPI
#   RESULTS    a folder that the job's first node can write to                  default: results-<job>
#
# hpccomm compares the launcher's size with the communicator's: the wrong --mpi, which starts many jobs of one rank in
# silence, ends with a sentence that says so.

PYTHON=${PYTHON:-python}
RESULTS=${RESULTS:-results-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
mkdir -p "$RESULTS"

# A rank on a GPU sees the one that belongs to its place on the node.
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

# As launch.  The signal USR1 goes to all ranks; when they have saved and ended, the job is queued again.
interruptible() {
    local status=0
    (RUN=exec launch "$@") &
    child=$!
    trap 'told=yes; kill -USR1 "$child"' USR1
    while :; do # a signal ends the waiting, not the program
        wait "$child" && status=0 || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    if [ -n "${told:-}" ]; then
        echo "signal USR1: run saved, job queued again"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60 # until Slurm ends this
    fi
    return "$status"
}
