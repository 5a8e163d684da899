// csrc/cuda/clusters.cuh on a GPU made of a few variables: what it sets, what it asks, and how often.
#include "clusters.cuh"

#include <cstdio>
#include <cstdlib>
#include <vector>

void ordinary(int) {}
void empty(int) { std::puts("called"); }  // compiled for another architecture

int most = 16, asked = 0, pending = 0;  // blocks of a cluster; occupancy queries; errors nobody has taken
std::vector<int> limits;                // of dynamic shared memory, as they were set

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaGetLastError() { return pending = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const int values[] = {9, 132, 233472, 232448, 1024};
  return *value = values[name], cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(int)) {
  return attributes->maxThreadsPerBlock = kernel == empty ? 1 : 192, cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(void (*kernel)(int), cudaFuncAttribute name, int value) {
  require(kernel == ordinary, "an empty kernel needs no attributes");
  if (name == cudaFuncAttributeMaxDynamicSharedMemorySize) limits.push_back(value);
  if (name == cudaFuncAttributeNonPortableClusterSizeAllowed) require(value == 1, "16 blocks must be allowed");
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(int), const cudaLaunchConfig_t* config) {
  ++asked;
  const unsigned ranks = config->attrs[0].val.clusterDim.x;
  require(config->numAttrs == 1 && config->gridDim.x % ranks == 0, "not a grid of clusters");
  require(config->dynamicSmemBytes <= size_t(limits.back()), "more shared memory than the kernel may have");
  if (config->blockDim.x != 192) return pending = 1, cudaErrorInvalidValue;
  return *clusters = int(ranks) <= most ? 3 : 0, cudaSuccess;
}

int main() {
  const fusedkd::Multiprocessors sm = fusedkd::multiprocessors(0);
  const auto fits = [&](void (*kernel)(int), int ranks, int shared, int device = 0, int threads = 192) {
    return fusedkd::cluster_fits(kernel, ranks, threads, shared, sm, device);
  };
  require(fits(ordinary, 16, 70000) && fits(ordinary, 16, 70000) && asked == 1, "asked once for a shape");
  require(fits(ordinary, 8, 232448) && asked == 2, "asked for another");
  most = 8;
  require(fits(ordinary, 16, 70000), "known");
  require(!fits(ordinary, 16, 70000, 1) && fits(ordinary, 8, 70000, 1), "another device, with less room");
  asked = 0;
  require(!fits(empty, 1, 1000) && asked == 0, "an empty kernel fits nowhere");
  require(!fits(ordinary, 2, 1000, 0, 64) && asked == 1 && pending == 0, "an error is a no, and is left to nobody");
  for (int shared : {1000, 200000}) fusedkd::Clusters(ordinary, 5, 4, 192, shared, sm);
  for (int limit : limits) require(limit == sm.shared_per_block, "two host threads would race for the limit");
}
