/* flock and fsync as file systems have them that lack something.
 *
 * FLOCK=nfs         as the Linux NFS client: a byte-range lock, which a descriptor open for reading cannot take
 * FLOCK=NUMBER      no locks: that errno
 * FOLDER_FSYNC=NUMBER  no fsync of a folder: that errno
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

int flock(int descriptor, int operation) {
  const char *how = getenv("FLOCK");
  if (!how) return syscall(SYS_flock, descriptor, operation);
  if (strcmp(how, "nfs")) {
    errno = atoi(how);
    return -1;
  }
  struct flock range = {0};
  range.l_type = operation & LOCK_UN ? F_UNLCK : operation & LOCK_EX ? F_WRLCK : F_RDLCK;
  range.l_whence = SEEK_SET;
  int result = fcntl(descriptor, operation & LOCK_NB ? F_OFD_SETLK : F_OFD_SETLKW, &range);
  if (result < 0 && errno == EACCES) errno = EWOULDBLOCK;
  return result;
}

int fsync(int descriptor) {
  const char *number = getenv("FOLDER_FSYNC");
  struct stat status;
  if (number && !fstat(descriptor, &status) && S_ISDIR(status.st_mode)) {
    errno = atoi(number);
    return -1;
  }
  return syscall(SYS_fsync, descriptor);
}
