// What a pipeline is compiled for: how all experts of a part are stored, where they are alike.
#pragma once
#include "matrix_code.h"

constant uint FIRST_CODE [[function_constant(0)]]; // FIRST_CODE_INDEX, SECOND_CODE_INDEX
constant uint SECOND_CODE [[function_constant(1)]];
/// Codes of a kernel's matrices, see matrix_code.h; 0: any.
constant uint FIRST_MATRIX = is_function_constant_defined(FIRST_CODE) ? FIRST_CODE : 0u;
constant uint SECOND_MATRIX = is_function_constant_defined(SECOND_CODE) ? SECOND_CODE : 0u;
