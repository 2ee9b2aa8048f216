#include "step.h"

const nightherd::Kind nightherd::FLOAT32 = nightherd::kind_of<nightherd::Float32>();
