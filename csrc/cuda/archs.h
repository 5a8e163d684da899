// What the CUDA library has code for: the list that setup.py gave to nvcc, such as "80 90a 90+PTX".
#ifndef FUSEDKD_ARCHS
#define FUSEDKD_ARCHS

#include <string_view>

#ifndef FUSEDKD_CUDA_ARCHS  // compiled by other means than setup.py
#define FUSEDKD_CUDA_ARCHS "unknown"
#endif
#define FUSEDKD_BUILT_FOR "built for the compute capabilities " FUSEDKD_CUDA_ARCHS  // setup.py looks for it, too

namespace fusedkd {

// Whether kernels for Hopper are among it: clusters and bulk copies compile for sm_90a alone, or its PTX.
constexpr bool has_hopper(std::string_view archs) { return archs.find("90a") != std::string_view::npos; }

}  // namespace fusedkd
#endif
