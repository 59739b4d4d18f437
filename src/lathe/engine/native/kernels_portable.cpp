#include "kernels_float.h"
#include "kernels_rows.h"
#include "kernels_whole.h"

#include "kernels_table.h"
LATHE_KERNELS(portable)
