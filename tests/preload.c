// A library for LD_PRELOAD: file systems that lack a call, as network and container mounts do. NO_MMAP=1: regular files
// cannot be mapped (ENODEV); NO_FOLDER_SYNC=1: folders cannot be synced (ENOTSUP); NO_FLOCK=1: there are no locks (ENOLCK).
// DISK_BYTES=N: a disk on which a file of N bytes leaves no space (ENOSPC). For tests/test_filesystems.sh, test_mpi.sh.
#define _GNU_SOURCE      // fwrite_unlocked
#include <errno.h>       // defines: errno
#include <stdio.h>       // defines: FILE, fileno, ftell, fwrite_unlocked
#include <stdlib.h>      // defines: atol, getenv
#include <sys/mman.h>    // defines: PROT_EXEC
#include <sys/stat.h>    // defines: fstat
#include <sys/syscall.h> // defines: SYS_mmap, SYS_fsync, SYS_flock
#include <unistd.h>      // defines: syscall

static int is_kind(int fd, mode_t kind) {
    struct stat info;
    return fd >= 0 && fstat(fd, &info) == 0 && (info.st_mode & S_IFMT) == kind;
}

void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t from) {
    // data only: the loader maps libraries with other calls, or executable
    if (getenv("NO_MMAP") && protection == PROT_READ && is_kind(fd, S_IFREG)) return errno = ENODEV, MAP_FAILED;
    return (void *)syscall(SYS_mmap, at, size, protection, flags, fd, from);
}

int fsync(int fd) {
    if (getenv("NO_FOLDER_SYNC") && is_kind(fd, S_IFDIR)) return errno = ENOTSUP, -1;
    return (int)syscall(SYS_fsync, fd);
}

int flock(int fd, int operation) {
    if (getenv("NO_FLOCK")) return errno = ENOLCK, -1;
    return (int)syscall(SYS_flock, fd, operation);
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    const char *disk = getenv("DISK_BYTES");
    const int fd = fileno(file);
    if (disk && fd > STDERR_FILENO && is_kind(fd, S_IFREG) && ftell(file) + (long)(size * count) > atol(disk))
        return errno = ENOSPC, 0;
    return fwrite_unlocked(data, size, count, file);
}
