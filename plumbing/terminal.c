// The terminal: a progress line that is replaced in place, and colours.
#include <stdarg.h>    // defines: va_list
#include <stdlib.h>    // defines: getenv
#include <string.h>    // defines: strcmp, strlen
#include <sys/ioctl.h> // defines: ioctl, TIOCGWINSZ
#include <unistd.h>    // defines: isatty, write
#include "plumbing.h"

static bool off;

void terminal_off(void) { off = true; }

bool on_terminal(void) {
    const char *term = getenv("TERM");
    return !off && isatty(STDOUT_FILENO) && (term == NULL || strcmp(term, "dumb") != 0);
}

bool in_color(void) {
    const char *no_color = getenv("NO_COLOR");
    return on_terminal() && (no_color == NULL || no_color[0] == 0);
}

static volatile bool shown;

static void put(const char *text) {
    if (write(STDOUT_FILENO, text, strlen(text)) < 0) shown = false; // nothing else can be done
}

void progress_line(const char *format, ...) {
    enum { WIDTH = 200 };
    char line[WIDTH + 1];
    struct winsize size = {0};
    va_list args;
    if (!on_terminal()) return;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    // A line that fills the terminal's width would scroll.
    const int columns = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col - 1 : 79;
    if (columns < WIDTH) line[columns] = 0;
    fflush(stdout);
    put("\r"), put(line), put("\033[K");
    shown = true;
}

void progress_end(void) {
    if (shown) put("\r\033[K");
    shown = false;
}
