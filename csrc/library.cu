// Marks that Python reads without loading the library: the sources and the CUDA version it was built from. The schemas
// are in library.cpp.

#define JITACCEL_TEXT_OF(x) #x
#define JITACCEL_TEXT(x) JITACCEL_TEXT_OF(x)

namespace jitaccel {
__attribute__((used)) extern const char cuda_source_mark[] = "jitaccel-sources:" JITACCEL_SOURCES;
__attribute__((used)) extern const char cuda_major_mark[] = "jitaccel-cuda-major:" JITACCEL_TEXT(__CUDACC_VER_MAJOR__) ";";
}  // namespace jitaccel
