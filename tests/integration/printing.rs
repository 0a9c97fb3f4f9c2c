//! Every command with a standard output that takes nothing: closed, full, and one whose
//! reader has gone. None panics; each says what became of its output, or dies quietly.

use std::process::{Command, Output};

use crate::daemon::{text, Daemon, Options};
use crate::require_qemu;

/// What the shell does to standard output, and the exit code of who writes there.
const KINDS: [(&str, i32); 3] = [(">&-", 1), (">/dev/full", 1), ("| true", 0)];

fn redirected(d: &Daemon, args: &[&str], redirection: &str) -> Output {
    let command = d.command(args);
    let mut shell = Command::new("bash");
    // With `| true` the exit code is this command's own, and its reader has gone before.
    let script = match redirection.starts_with('|') {
        true => "(sleep 0.3; exec \"$0\" \"$@\") | true; exit ${PIPESTATUS[0]}".to_string(),
        false => format!("exec \"$0\" \"$@\" {redirection}"),
    };
    shell.arg("-c").arg(script).arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        shell.env(key, value.unwrap());
    }
    shell.output().unwrap()
}

#[test]
fn no_command_panics_whatever_its_output_is() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let id = d.ok(&["get"]).trim().to_string();
    let man = d.dir.0.join("man");
    let man = man.to_str().unwrap();
    let commands: &[&[&str]] = &[
        &["--help"],
        &["--version"],
        &["run", "--help"],
        &["status"],
        &["status", "--json"],
        &["status", "--openmetrics"],
        &["list"],
        &["list", "--json"],
        &["ps", &id],
        &["ps", &id, "--json"],
        &["stats", &id],
        &["stats", &id, "--json"],
        &["config", "show"],
        &["config", "check"],
        &["doctor", "--no-boot"],
        &["doctor", "--no-boot", "--json"],
        &["agent", "matrix"],
        &["agent", "matrix", "--json"],
        &["template", "status"],
        &["factory", "status"],
        &["generate", "completions", man],
        &["run", "--", "echo", "x"],
        &["exec", &id, "--", "echo", "x"],
        &["bench", "--n", "1", "--cold", "0"],
        &["get"],
        &["stop", &id],
    ];
    for args in commands {
        for (redirection, code) in KINDS {
            let out = redirected(&d, args, redirection);
            let err = text(&out.stderr);
            let what = format!("{args:?} {redirection}: {:?} {err}", out.status.code());
            assert!(!err.contains("panicked") && out.status.code() != Some(101), "{what}");
            // A command of others' has an exit code of its own, and `stop` a VM that has gone.
            let runs = args.contains(&"--");
            let own = !runs && !matches!(args[0], "stop" | "generate" | "template");
            let checks = matches!(args[..], ["doctor", ..] | ["config", "check"]);
            if own && !checks {
                assert_eq!(out.status.code(), Some(code), "{what}");
                assert!(code == 0 || err.contains("standard output"), "{what}");
                assert!(code != 0 || err.is_empty(), "{what}");
            }
            if runs {
                // As of a local one, which may have written before its reader went.
                let wanted: &[i32] = if code == 0 { &[0, 141] } else { &[125] };
                assert!(wanted.contains(&out.status.code().unwrap()), "{what}");
            }
        }
    }
    // Standard error may be closed as well.
    for args in [&["nosuch"][..], &["exec", "nosuch", "--", "true"], &["status"]] {
        let out = redirected(&d, args, ">&- 2>&-");
        assert!(out.status.code().is_some_and(|c| c != 0 && c != 101), "{args:?} {out:?}");
    }
    d.quit();
}
