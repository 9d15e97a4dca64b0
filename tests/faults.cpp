// Faults of a disk and of the clock for a process that loads this by LD_PRELOAD, and its children.
//
//   FAULT_FOLDER  files whose path begins so
//   FAULT_DISK    what becomes of their writes and fsyncs:
//                 full:N     from the Nth on there is no room     failing:N  the Nth fails (EIO)
//                 hang:N     the Nth takes three seconds          slow:N     each takes N microseconds
//                 short:0    a write takes half of its bytes
//   FAULT_SYNCED  a file to which each fsync (size, path) and rename (from, to) is appended
//   FAULT_CLOCK   seconds by which the wall clock is wrong in every other second
//
// Without these variables every call is the C library's own.

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

namespace {

template <typename F>
F next(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

bool path_of(int fd, char (&path)[PATH_MAX]) {
  const char* folder = getenv("FAULT_FOLDER");
  if (!folder) return false;
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return false;
  path[size] = 0;
  return strncmp(path, folder, strlen(folder)) == 0;
}

// Returns whether the call fails, with errno, or the bytes that a write may take.
bool fails(int fd, size_t* size) {
  static std::atomic<long> calls{0};
  const char* fault = getenv("FAULT_DISK");
  char path[PATH_MAX];
  if (!fault || !path_of(fd, path)) return false;
  long number = atol(strchr(fault, ':') + 1), call = ++calls;
  if (*fault == 'f' && fault[1] == 'u' && call >= number) errno = ENOSPC;
  else if (*fault == 'f' && fault[1] == 'a' && call == number) errno = EIO;
  else {
    if (fault[1] == 'l') usleep(number);
    if (*fault == 'h' && call == number) sleep(3);
    if (fault[1] == 'h' && size && *size > 1) *size /= 2;
    return false;
  }
  return true;
}

void note(const char* text) {
  const char* journal = getenv("FAULT_SYNCED");
  if (!journal) return;
  int fd = open(journal, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  ssize_t written = next<ssize_t (*)(int, const void*, size_t)>("write")(fd, text, strlen(text));
  (void)written;
  close(fd);
}

int noted_sync(int fd, int result) {
  char path[PATH_MAX], line[PATH_MAX + 32];
  struct stat now;
  if (result == 0 && getenv("FAULT_SYNCED") && path_of(fd, path) && fstat(fd, &now) == 0) {
    snprintf(line, sizeof line, "%lld\t%s\n", static_cast<long long>(now.st_size), path);
    note(line);
  }
  return result;
}

long wrong_by() {
  const char* seconds = getenv("FAULT_CLOCK");
  if (!seconds) return 0;
  timespec now;
  next<int (*)(clockid_t, timespec*)>("clock_gettime")(CLOCK_MONOTONIC, &now);
  return now.tv_sec % 2 ? atol(seconds) : 0;
}

}  // namespace

extern "C" {

ssize_t write(int fd, const void* bytes, size_t size) {
  static auto own = next<ssize_t (*)(int, const void*, size_t)>("write");
  return fails(fd, &size) ? -1 : own(fd, bytes, size);
}

ssize_t pwrite64(int fd, const void* bytes, size_t size, off64_t at) {
  static auto own = next<ssize_t (*)(int, const void*, size_t, off64_t)>("pwrite64");
  return fails(fd, &size) ? -1 : own(fd, bytes, size, at);
}

ssize_t pwrite(int fd, const void* bytes, size_t size, off_t at) {
  return pwrite64(fd, bytes, size, at);
}

int fsync(int fd) {
  static auto own = next<int (*)(int)>("fsync");
  return fails(fd, nullptr) ? -1 : noted_sync(fd, own(fd));
}

int fdatasync(int fd) {
  static auto own = next<int (*)(int)>("fdatasync");
  return fails(fd, nullptr) ? -1 : noted_sync(fd, own(fd));
}

int rename(const char* from, const char* to) {
  static auto own = next<int (*)(const char*, const char*)>("rename");
  char line[2 * PATH_MAX + 8];
  int result = own(from, to);
  snprintf(line, sizeof line, "rename\t%s\t%s\n", from, to);
  if (result == 0) note(line);
  return result;
}

int clock_gettime(clockid_t clock, timespec* now) {
  static auto own = next<int (*)(clockid_t, timespec*)>("clock_gettime");
  int result = own(clock, now);
  if (clock == CLOCK_REALTIME) now->tv_sec += wrong_by();
  return result;
}

int gettimeofday(timeval* now, void* zone) {
  static auto own = next<int (*)(timeval*, void*)>("gettimeofday");
  int result = own(now, zone);
  now->tv_sec += wrong_by();
  return result;
}

time_t time(time_t* now) {
  timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  if (now) *now = exact.tv_sec;
  return exact.tv_sec;
}
}
