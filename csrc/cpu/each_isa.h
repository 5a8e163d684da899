// isa.h includes this once per instruction set.
#include FUSEDKD_BODY

// The guards of all headers that belong to an instruction set. One that is missing here does not compile: its functions
// would be missing in the second namespace.
#undef FUSEDKD_ATTENTION_ROWS
#undef FUSEDKD_CROSS_ENTROPY
#undef FUSEDKD_DIVERGENCES
#undef FUSEDKD_GUMBEL_NOISE
#undef FUSEDKD_GUMBEL_ROWS
#undef FUSEDKD_HIDDEN_COLUMNS
#undef FUSEDKD_HIDDEN_ROWS
#undef FUSEDKD_KD_FIRST_PASS
#undef FUSEDKD_KD_LANES
#undef FUSEDKD_KD_PASS
#undef FUSEDKD_KD_ROWS
#undef FUSEDKD_LAYER_ROWS
#undef FUSEDKD_LOGITS
#undef FUSEDKD_SOFTMAX
#undef FUSEDKD_STATISTICS_ROWS
#undef FUSEDKD_TOPK_DIVERGENCES
#undef FUSEDKD_TOPK_LIST
#undef FUSEDKD_TOPK_ROWS
#undef FUSEDKD_TRANSPOSE
#undef FUSEDKD_VEC

#undef FUSEDKD_NAMESPACE
#undef FUSEDKD_VECTOR_BYTES
