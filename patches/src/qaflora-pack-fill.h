// The values of a pack's tensors.

#pragma once

#include "qaflora-pack-plan.h"

// reads the files into the tensors of the plan, which must have been allocated
void qaflora_fill_pack(qaflora_pack & pack, const std::vector<qaflora_adapter_file> & files, const qaflora_plan & plan);
