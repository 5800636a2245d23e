/* Runs the checks of all instructions: on the model under the time of IFKV_EMU_TIME, or on a GPU
 * when built by nvcc. */
#include "checks.h"
#include "device.h"

#ifdef IFKV_EMU
#include "emu_report.h"
#endif

int main() {
#ifdef IFKV_EMU
    printf("emulated device, time %s\n", emu_time_name());
#else
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
        printf("no GPU\n");
        return 1;
    }
    printf("%s\n", properties.name);
#endif
    check_warp();
    check_matrix();
    check_copy();
#ifdef IFKV_CHECK_SM90
    check_bulk();
    check_wgmma();
#endif
    printf("%d claims held, %d did not\n", check_passed, check_failed);
    return check_failed > 0;
}
