//! Faults in numbers: clients, VMs and servers that are killed at any moment, QEMUs
//! that can not be started or hang, a host without room or file descriptors. After
//! each, what is there is counted from /proc and the file system, not from vmcache's
//! own books; it prints a table, and fails on any loss.
//!
//! `tests/run` runs a small number of each. By hand: `tests/chaos/run` for as many as
//! the README's table says, `VMCACHE_CHAOS=N` for N hundredths of that.

// Tests start processes and threads, and print what they find.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros)]

mod count;
#[path = "../integration/daemon.rs"]
#[allow(dead_code)] // The other tests' part.
mod daemon;
mod field;
mod guests;
mod hosts;
mod rows;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use field::Row;

/// How much of the long run there is, in hundredths, unless it is said.
const SHORT: u32 = 5;

/// Brings a fault about so many times.
type Fault = fn(&Path, u32) -> Row;

fn main() -> ExitCode {
    let Some(prepared) = daemon::prepared() else { return ExitCode::SUCCESS };
    let share = std::env::var("VMCACHE_CHAOS").ok().map_or(SHORT, |n| n.parse().unwrap());
    let times = |all: u32| (all * share).div_ceil(100);
    let rows: [(&str, u32, Fault); 13] = [
        ("clients SIGKILLed in a claim", times(1000), rows::clients),
        ("QEMUs SIGKILLed", times(200), rows::qemus_killed),
        ("servers SIGKILLed under load", times(100), rows::servers),
        ("servers restarted under load", times(50), rows::restarts),
        ("QEMU can not be started", times(10), rows::unstartable),
        ("run directory full", times(20), rows::no_room),
        ("run directory forbidden (EACCES)", times(20), hosts::forbidden),
        ("no file descriptors left", times(10), rows::no_fds),
        ("QEMUs SIGSTOPped", times(20), rows::stopped),
        ("no more processes (RLIMIT_NPROC)", times(10), hosts::no_processes),
        ("vsock devices SIGKILLed", times(50), guests::vsock_devices),
        ("agents silent, garbled, endless", times(15), guests::agents),
        ("clock set back and forth an hour", times(60), hosts::clock),
    ];
    // Words of the command line choose among them, as with other tests.
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |fault: &str| words.is_empty() || words.iter().any(|w| fault.contains(w));
    let (mut lost, mut run_all) = (0, 0);
    println!("{}", Row::HEAD);
    for (fault, times, run) in rows.into_iter().filter(|(fault, ..)| wanted(fault)) {
        let start = Instant::now();
        let row = run(&prepared, times);
        println!("{}", row.line(fault, times, start.elapsed()));
        for what in &row.leaked {
            println!("  left: {what}");
        }
        lost += u32::from(!row.good());
        run_all += 1;
    }
    let passed = run_all - lost;
    let word = if lost == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {word}. {passed} passed; {lost} failed; 0 ignored");
    ExitCode::from(u8::from(lost > 0))
}
