#include "step.h"

const nightherd::Kind nightherd::BFLOAT16 = nightherd::kind_of<nightherd::BFloat16>();
