/* A disk that takes 2 ms to make data durable, as a networked one does: loaded into the server before the C library. */
#include <time.h>

static int wait_for_disk(void)
{
    struct timespec latency = {0, 2000000};
    nanosleep(&latency, 0);
    return 0;
}

int fsync(int descriptor)
{
    (void) descriptor;
    return wait_for_disk();
}

int fdatasync(int descriptor)
{
    (void) descriptor;
    return wait_for_disk();
}
