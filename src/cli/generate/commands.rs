//! What the pages of `run`, `exec` and `kill` say beyond their options: streams, signals,
//! exit codes, users.
//!
//! Each row of the table of streams has its test in tests/integration/streams.rs.

use clap_mangen::roff::{roman, Roff};

use super::manual::{item, paragraph, section};

/// What a standard output or error may be, and what happens.
const OUTPUTS: [(&str, &str); 10] = [
    ("file, pipe, socket, terminal", "Every byte arrives, in the order in which it was written to that stream. The order between the two streams is not kept."),
    ("pipe or socket whose reader goes", "The guest's end is closed at once: the command gets SIGPIPE by its next write, or EPIPE if it ignores the signal, and the exit code is its own (141 for the signal). An agent of Kata's cannot close it: there the command gets SIGPIPE, and SIGKILL when it writes on for 2 s."),
    ("FIFO with a name, whose reader goes", "The same, but when something is written: another reader may come."),
    ("FIFO without a reader that was opened for both", "What fits; then the command waits in its write."),
    ("process left behind that holds it", "In a guest of Kata's agents it is waited for until it has been silent for 10 s; in one of our own, until it has closed it, or --timeout: when there was nothing for 1 s, the command's own code is told."),
    ("reader that stops", "The command waits in its write. --timeout holds nevertheless, and INT, TERM, HUP and QUIT: 5 s after they have ended the command, nobody is waited for any more. A command that ends by itself has its output waited for."),
    ("non-blocking", "As one that blocks. No flag of it is changed."),
    ("/dev/full, full disk", "One line on standard error, exit code 125. The command's end is closed, as for a reader that goes."),
    ("closed", "The same, once the command writes to it; one that writes nothing exits as ever."),
    ("an error when it is closed (NFS, quotas)", "One line, exit code 125."),
];

/// The same of standard input.
const INPUTS: [(&str, &str); 8] = [
    ("file, pipe, socket, FIFO", "Every byte, until its end. More may be read than the command takes: a loop that reads from it as well wants -n."),
    ("-n, /dev/null, closed", "The command's input is at its end at once."),
    ("non-blocking", "As one that blocks: nothing there yet is no end."),
    ("terminal", "Its lines. With --tty, its keys, raw."),
    ("terminal that another job has", "Waited for until this one is in front again. The job is not stopped, as one that reads is by the shell's rules: exec … & works without -n."),
    ("writer that stops", "The command waits in its read."),
    ("open for writing only, as nohup leaves it", "The command's input is at its end at once."),
    ("directory, or an error when it is read", "The command's input is at its end. One line on standard error, exit code 125."),
];

const SIGNALS: [(&str, &str); 6] = [
    ("passed on", "All that can be caught, real-time ones included, from the command's start on; one that comes while it is being started waits for it, INT, TERM, HUP and QUIT at most 2 s."),
    ("ignored", "What this program was started to ignore, as by nohup or a script's &, stays ignored."),
    ("not passed on", "CHLD, URG, PIPE, and TSTP, TTIN, TTOU, by which a shell stops this program; WINCH with --tty, which changes the terminal's size instead."),
    ("guests of Kata's agents", "The command is its namespace's first process: what it has no handler for does nothing to it, as in a container without an init. KILL ends it, and --timeout."),
    ("KILL, STOP", "Nobody can pass these on: vmcache kill sends them, as any other."),
    ("before there is a command", "One that ends a program ends this one, and a VM that was claimed for it."),
];

const CODES: [(&str, &str); 7] = [
    ("0 to 255", "The command's own."),
    ("2", "The command line or the configuration is wrong."),
    ("124", "The time of --timeout is over; the command was killed."),
    ("125", "vmcache failed, or bytes of a stream did not arrive; one line says why."),
    ("126", "The program is there and cannot be executed."),
    ("127", "There is no such program, or its interpreter is not there."),
    ("128+n", "Signal n ended the command."),
];

/// What the page of a command says beyond its options.
pub fn more(page: &mut Roff, name: &str) {
    match name {
        "vmcache-run" | "vmcache-exec" => {
            streams(page);
            list(page, "SIGNALS", &SIGNALS);
            list(page, "EXIT STATUS", &CODES);
            users(page);
            if name == "vmcache-exec" {
                lifetime(page);
            }
        }
        "vmcache-kill" => lifetime(page),
        _ => {}
    }
}

fn list(page: &mut Roff, title: &str, rows: &[(&str, &str)]) {
    section(page, title);
    for (term, text) in rows {
        item(page, term, text);
    }
}

fn streams(page: &mut Roff) {
    list(page, "STANDARD OUTPUT AND ERROR", &OUTPUTS);
    list(page, "STANDARD INPUT", &INPUTS);
}

fn users(page: &mut Roff) {
    section(page, "USERS");
    paragraph(page, [roman(
        "As docker's: NAME, UID, NAME:GROUP, UID:GID, :GROUP. A number is always a number, 0 to \
         2147483647. Names, home directory and supplementary groups are of the /etc/passwd and \
         /etc/group in the command's root; a group that is given replaces the supplementary ones. \
         /dev/stdin, /dev/stdout, /dev/stderr and the terminal are the user's own to open.",
    )]);
}

fn lifetime(page: &mut Roff) {
    section(page, "WHAT EXEC LEAVES");
    paragraph(
        page,
        [roman(
            "In a VM of run --keep whose command runs, exec joins it: what exec leaves in the \
         background lives until that command ends, under exec's name in vmcache ps, and vmcache \
         kill --exec reaches it (but what has made a session of its own). In any other VM, exec's command has processes \
         of its own, which end with it. An exec whose client was killed (SIGKILL) goes on in the \
         guest: the column EXEC of vmcache ps names it, and vmcache kill --exec ends it.",
        )],
    );
}
