// The mark by which a library that was built from other sources is told; the schemas are library.cpp's.

namespace jitaccel {
__attribute__((used)) extern const char cuda_source_mark[] = "jitaccel-sources:" JITACCEL_SOURCES;
}
