// Included before all else in wheels that are given away. From glibc 2.38 on C++ gets C23's strtol and
// sscanf, which older systems do not have. features.h is read once, so what it chose can be changed.
#include <features.h>
#undef __GLIBC_USE_C2X_STRTOL
#undef __GLIBC_USE_C23_STRTOL
#define __GLIBC_USE_C2X_STRTOL 0
#define __GLIBC_USE_C23_STRTOL 0
