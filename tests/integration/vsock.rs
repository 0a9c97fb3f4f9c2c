//! Kernel vsock, in a VM that has it: see tests/nested/run.

use std::process::{Command, Stdio};

use crate::daemon::text;
use crate::require_qemu;

/// All of it, in seconds: two boots of a guest under a translator that is itself
/// translated.
const ALL: &str = "1800";

#[test]
fn direct_vms_and_clones_are_reached_over_vsock() {
    let prepared = require_qemu!();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/nested/run");
    let out = Command::new("timeout")
        .args([ALL, script])
        .args([&prepared])
        .arg(env!("CARGO_BIN_EXE_vmcache"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    // The first line may stand behind what the VM's firmware does to a terminal.
    let said = text(&out.stdout);
    let lines: Vec<&str> =
        said.lines().filter_map(|l| l.split_once("nested: ")).map(|(_, l)| l).collect();
    let expected =
        ["a direct VM over vsock", "clones over vsock, each with a CID of its own", "done"];
    assert_eq!(lines, expected, "{:?}\n{said}\n{}", out.status, text(&out.stderr));
    assert!(out.status.success());
}
