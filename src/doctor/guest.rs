//! QEMU and KVM, and whether a guest boots.

use std::fs::OpenOptions;
use std::time::Duration;

use super::{finding, good, Finding, State};
use crate::config::{Accel, Config};
use crate::process::Process;
use crate::report::chain;
use crate::sys::cage::Cage;
use crate::vm::birth::Watch;
use crate::vm::boot::{boot, Phase, Purpose};

/// How long QEMU may take to say something about itself.
const ASKED: Duration = Duration::from_secs(10);

/// QEMU and KVM's device.
pub fn parts(config: &Config) -> Vec<Finding> {
    vec![qemu(config), machine(config), kvm(config)]
}

/// What QEMU prints when it is asked so.
fn asked(config: &Config, args: &[&str]) -> Result<String, String> {
    let args: Vec<_> = args.iter().map(|a| (*a).into()).collect();
    let mut qemu =
        Process::spawn(&config.qemu(), &args, &[], true, Cage::default()).map_err(|e| chain(&e))?;
    match qemu.wait(ASKED) {
        true => Ok(qemu.last_words().trim_start_matches("it wrote: ").to_string()),
        false => Err(format!("it did not answer within {} s", ASKED.as_secs())),
    }
}

fn qemu(config: &Config) -> Finding {
    let path = config.qemu().display().to_string();
    match asked(config, &["-version"]) {
        Ok(text) if text.contains("version") => {
            good("qemu", format!("{path}: {}", text.lines().next().unwrap_or_default()))
        }
        Ok(text) => {
            finding("qemu", State::Missing, format!("{path}: {text}"), "name a QEMU as path")
        }
        Err(e) => finding(
            "qemu",
            State::Missing,
            e,
            "install QEMU (Debian: qemu-system-x86; Fedora: qemu-kvm-core), or set its path",
        ),
    }
}

fn machine(config: &Config) -> Finding {
    let name = config.machine.name();
    let known = asked(config, &["-machine", "help"]).unwrap_or_default();
    let there = known.lines().any(|l| l.split_whitespace().next() == Some(name));
    match there {
        true => good("machine", format!("{name} is one of QEMU's")),
        false => finding(
            "machine",
            State::Missing,
            format!("{name} is none of QEMU's machines"),
            "choose another machine_type, or another QEMU",
        ),
    }
}

fn kvm(config: &Config) -> Finding {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    match (config.accel, opened) {
        (Accel::Kvm, Ok(_)) => good("kvm", "/dev/kvm opens (whether guests run: see boot)"),
        (Accel::Kvm, Err(e)) => finding(
            "kvm",
            State::Missing,
            format!("open /dev/kvm: {e}"),
            "enable virtualisation in the firmware, load kvm_intel or kvm_amd, join group kvm; \
             or set accel = \"tcg\", which is many times slower",
        ),
        (Accel::Tcg, Ok(_)) => finding(
            "kvm",
            State::Note,
            "accel is \"tcg\", and /dev/kvm opens",
            "try accel = \"kvm\": `vmcache doctor` then boots a guest with it",
        ),
        (Accel::Tcg, Err(_)) => finding(
            "kvm",
            State::Note,
            "accel is \"tcg\": guests are translated, many times slower than with KVM",
            "",
        ),
    }
}

/// A guest that boots and whose agent answers proves most of it.
pub fn boots(config: &Config, wanted: bool, watch: Watch<'_>) -> Finding {
    if !wanted {
        let text = "no guest was booted";
        return finding(
            "boot",
            State::Note,
            text,
            "run doctor without --no-boot, as a server runs",
        );
    }
    let since = std::time::Instant::now();
    let e = match boot(config, &Purpose::Own { leased: true, waits: false }, watch) {
        Ok(vm) => {
            vm.destroy();
            let took = since.elapsed().as_secs_f64();
            return good("boot", format!("a guest's agent answered after {took:.1} s"));
        }
        Err(e) => e,
    };
    let remedy = match (e.phase, config.accel) {
        (Phase::Guest | Phase::Monitor, Accel::Kvm) => {
            "/dev/kvm opens, but a guest does not run with it: a virtual machine in a virtual \
             machine, often. Use another host, or set accel = \"tcg\""
        }
        (Phase::Guest, Accel::Tcg) => {
            "make boot_timeout longer, or try another kernel and `vmcache mkinitrd`"
        }
        _ => "what QEMU wrote says it",
    };
    finding("boot", State::Missing, chain(&e), remedy)
}
