# shellcheck shell=sh
# The environment of a run on one machine, with more ranks than cores if need be; to be sourced.
# Whatever the user has set stays.  Not for several nodes: the transport below is shared memory.

if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT="${OMPI_ALLOW_RUN_AS_ROOT-1}"
    export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="${OMPI_ALLOW_RUN_AS_ROOT_CONFIRM-1}"
fi

# A waiting rank must give its core away: without this a small message takes milliseconds, not microseconds.
export OMPI_MCA_rmaps_base_oversubscribe="${OMPI_MCA_rmaps_base_oversubscribe-1}"
export OMPI_MCA_mpi_yield_when_idle="${OMPI_MCA_mpi_yield_when_idle-1}"
# Pinned ranks would run all their threads on one core.
export OMPI_MCA_hwloc_base_binding_policy="${OMPI_MCA_hwloc_base_binding_policy-none}"
# Containers forbid the single-copy path, which then fails late and loudly.
export OMPI_MCA_btl="${OMPI_MCA_btl-self,vader}"
export OMPI_MCA_btl_vader_single_copy_mechanism="${OMPI_MCA_btl_vader_single_copy_mechanism-none}"
# Probing displays and OpenCL costs start-up time and may print warnings.
export HWLOC_COMPONENTS="${HWLOC_COMPONENTS--opencl,-gl}"
# Open MPI looks for a remote shell even when every rank is local.
if ! command -v ssh >/dev/null 2>&1; then
    export OMPI_MCA_plm_rsh_agent="${OMPI_MCA_plm_rsh_agent-}"
fi

# Ranks already fill the cores; BLAS threads on top of them slow the products down.
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS-1}"

# A thread that spins at a barrier takes the core from the one it waits for.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY-passive}"
