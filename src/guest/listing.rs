//! ListProcesses: what runs in a container, from /proc.

use std::fs;

use super::failure::{Failure, Outcome};
use crate::sys::process::{parent, session};

/// Every process of the guest but the kernel's own.
pub fn everything() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse().ok());
    let mut pids: Vec<i32> =
        pids.filter(|p| fs::read_link(format!("/proc/{p}/exe")).is_ok()).collect();
    pids.sort_unstable();
    pids
}

/// What Kata's runtimes ask ps for when nobody wants anything else.
const USUAL: &str = "-ef";

/// The pids as a JSON array, or a table, which is our own: a guest may have no ps(1)
/// to give arguments to.
/// `started` are the processes that requests made: container, name and pid.
pub fn processes(
    pids: Vec<i32>,
    started: &[(String, String, i32)],
    format: &str,
    args: &[String],
) -> Outcome<Vec<u8>> {
    if args.iter().any(|a| a != USUAL) {
        let text = "this guest's agent prints one table only: leave the arguments for ps out";
        return Err(Failure::invalid(text));
    }
    match format {
        "json" => {
            let list: Vec<String> = pids.iter().map(|p| p.to_string()).collect();
            Ok(format!("[{}]", list.join(",")).into_bytes())
        }
        "table" | "" => {
            let mut out = String::from("  PID   UID STAT    RSS(KiB) EXEC          COMMAND\n");
            for pid in pids {
                out.push_str(&row(pid, owner(pid, started)));
            }
            Ok(out.into_bytes())
        }
        other => Err(Failure::invalid(format!("process list format {other:?}: json or table"))),
    }
}

/// Generations that are looked through for the process that a request made.
const MAX_GENERATIONS: usize = 256;

/// The name under which a process, or its forebear, was started: what `vmcache kill
/// --exec` takes. One that was taken over by a container's init still is of the session of
/// who started it, unless it has made one of its own.
fn owner(pid: i32, started: &[(String, String, i32)]) -> &str {
    let mut at = pid;
    for _ in 0..MAX_GENERATIONS {
        let of = |pid: i32| started.iter().find(|s| s.2 == pid);
        if let Some((_, name, _)) = of(at).or_else(|| session(at).and_then(of)) {
            return name;
        }
        match parent(at) {
            Some(next) if next > 1 => at = next,
            _ => break,
        }
    }
    "-"
}

/// A line; empty when the process has just ended.
fn row(pid: i32, owner: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        status
            .lines()
            .find_map(|l| l.strip_prefix(name))
            .and_then(|v| v.split_whitespace().next())
            .unwrap_or("-")
            .to_string()
    };
    if status.is_empty() {
        return String::new();
    }
    let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<_> = raw.split(|b| *b == 0).map(String::from_utf8_lossy).collect();
    let mut command = words.join(" ").trim_end().to_string();
    if command.is_empty() {
        command = format!("[{}]", field("Name:"));
    }
    // A row is one line, whatever a program calls itself. What a terminal would take for a
    // command is the client's to escape: it does not trust an agent to.
    let command = command.replace('\n', "\\n");
    format!(
        "{pid:>5} {:>5} {:<4} {:>11} {owner:<13} {command}\n",
        field("Uid:"),
        field("State:"),
        field("VmRSS:")
    )
}
