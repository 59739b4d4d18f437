// The table that an instruction set's file ends with.
#pragma once

#define LATHE_KERNELS(set)                                                                          \
    namespace lathe {                                                                               \
    extern const Kernels kernels_##set;                                                             \
    const Kernels kernels_##set = {                                                                 \
        #set,   multiply_float, pack_float, multiply_packed, multiply_byte, multiply_nibble, unpack, \
        finish, normalise,      round_row,  rotate,          attend,        choose,          scale_add, \
        pack_byte, pack_nibble};                                                                    \
    }
