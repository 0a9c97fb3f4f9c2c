//! How far guests are isolated here: by QEMU's policy, by the walls around it, and by the host's
//! processor and kernel; and what cannot be known from here.

use std::fs;
use std::path::Path;

use super::{finding, good, Finding, State};
use crate::config::options::OURS;
use crate::config::{Accel, Config};
use crate::confine::isolation::isolation;
use crate::confine::network;
use crate::confine::user::Whose;
use crate::sys::library;

/// Where the kernel tells of its processor's flaws.
const FLAWS: &str = "/sys/devices/system/cpu/vulnerabilities";
/// Modules of KVM, by their parameter for guests that run VMs.
const NESTED: [&str; 2] =
    ["/sys/module/kvm_intel/parameters/nested", "/sys/module/kvm_amd/parameters/nested"];
/// libslirp, and the first version without the flaws of 2021 (CVE-2021-3592 to -3595).
const SLIRP: (&str, &str) = ("libslirp.so.0", "slirp_version_string");
const SLIRP_MENDED: [u32; 3] = [4, 6, 1];

/// All of it.
pub fn isolation_findings(config: &Config) -> Vec<Finding> {
    vec![
        word(config),
        users(config),
        networks(config),
        flaws(Path::new(FLAWS)),
        nested(config),
        user_network(),
        unknown(),
    ]
}

fn word(config: &Config) -> Finding {
    let told = isolation(config);
    let text = format!("{}, {}", told.accel, told.isolation);
    match told.isolation {
        "vm" => good("isolation", format!("{text}: the processor's, and walls around each QEMU")),
        "weak" => {
            finding("isolation", State::Warning, format!("{text}: {}", told.why), "mend that")
        }
        _ => finding(
            "isolation",
            State::Warning,
            format!("{text}: {}", told.why),
            "use accel = \"kvm\" for guests that you do not trust",
        ),
    }
}

fn users(config: &Config) -> Finding {
    let whose = match Whose::of(config) {
        Ok(whose) => whose,
        Err(why) => return finding("users", State::Missing, why, "mend `user`"),
    };
    let said = whose.described();
    match (whose.check(), &whose) {
        (Err(why), _) => finding("users", State::Missing, why, "leave `user` out"),
        (Ok(warnings), _) if !warnings.is_empty() => {
            finding("users", State::Warning, warnings.join("; "), "leave `user` out")
        }
        (Ok(_), Whose::Range(..)) => good("users", said),
        (Ok(_), Whose::Server) => finding(
            "users",
            State::Note,
            said,
            "run the server as root: it gives each VM a user of its own",
        ),
        (Ok(_), _) => finding("users", State::Warning, said, "leave `user` out"),
    }
}

fn networks(config: &Config) -> Finding {
    match network::lacking() {
        _ if !config.flag(OURS, "confine") => {
            finding("network", State::Warning, "confine is false: QEMU is in the host's", "")
        }
        None => good("network", "QEMU is in an empty network namespace"),
        Some(why) => finding(
            "network",
            State::Note,
            format!(
                "no network namespace can be made ({why}): QEMU's filter of calls stands alone"
            ),
            "run the server as root",
        ),
    }
}

/// What the kernel says of its processor: a line for each flaw.
fn flaws(dir: &Path) -> Finding {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut open: Vec<String> = entries
        .filter_map(|e| {
            let said = fs::read_to_string(e.path()).ok()?;
            let name = e.file_name().to_string_lossy().into_owned();
            said.to_lowercase().contains("vulnerable").then(|| format!("{name}: {}", said.trim()))
        })
        .filter(|said| !said.ends_with(": Not affected"))
        .collect();
    open.sort();
    match open.len() {
        0 if dir.is_dir() => good("processor", "the kernel knows of no flaw that is open"),
        0 => finding("processor", State::Note, "this kernel tells nothing of its flaws", ""),
        _ => finding(
            "processor",
            State::Warning,
            open.join("; "),
            "newer microcode and kernel, or what the kernel's admin-guide/hw-vuln says of it \
             (nosmt, for some)",
        ),
    }
}

fn nested(config: &Config) -> Finding {
    let on = NESTED.iter().filter_map(|path| fs::read_to_string(path).ok());
    let on = on.map(|t| t.trim().to_string()).any(|t| t == "Y" || t == "1");
    match (config.flag(OURS, "nested"), on) {
        (true, _) => finding(
            "nested",
            State::Warning,
            "nested = true: guests reach the host kernel's code for VMs in VMs",
            "leave it out, where guests need no VMs of their own",
        ),
        (false, true) => {
            good("nested", "the host's KVM would let guests run VMs; they do not see it")
        }
        (false, false) if config.accel == Accel::Tcg => good("nested", "guests cannot run VMs"),
        (false, false) => good("nested", "guests cannot run VMs: neither they nor KVM have it"),
    }
}

/// Of `run --net user`.
fn user_network() -> Finding {
    let passt = ["/usr/bin/passt", "/usr/local/bin/passt"].iter().any(|p| Path::new(p).exists());
    let passt = if passt { "passt is there" } else { "passt is not installed" };
    let Some(version) = library::text_of(SLIRP.0, SLIRP.1) else {
        let text = format!("libslirp's version is not known here; {passt}");
        return finding("user network", State::Note, text, "");
    };
    let text = format!("QEMU's is libslirp {version}, in a process of its own; {passt}");
    let numbers: Vec<u32> = version.split('.').filter_map(|n| n.parse().ok()).collect();
    match numbers[..] < SLIRP_MENDED[..] {
        true => finding(
            "user network",
            State::Warning,
            format!("{text}; flaws of that version are known"),
            "a newer libslirp, or `--net user,by=passt`",
        ),
        false => good("user network", text),
    }
}

/// A row that says what the others do not.
fn unknown() -> Finding {
    let release = nix::sys::utsname::uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    finding(
        "not known",
        State::Note,
        format!(
            "whether Linux {release}, QEMU, microcode and libraries have all mends that their \
             makers have published"
        ),
        "follow your distribution's security notices",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processors_flaws_are_read_as_the_kernel_writes_them() {
        let dir = std::env::temp_dir().join(format!("vmcache-flaws-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let write = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
        write("mds", "Not affected\n");
        write("spectre_v1", "Mitigation: usercopy/swapgs barriers\n");
        assert_eq!(flaws(&dir).state, State::Good);
        write(
            "l1tf",
            "Mitigation: PTE Inversion; VMX: conditional cache flushes, SMT vulnerable\n",
        );
        write("tsa", "Vulnerable: No microcode\n");
        let found = flaws(&dir);
        assert_eq!(found.state, State::Warning);
        assert!(found.evidence.starts_with("l1tf: ") && found.evidence.contains("tsa: Vulnerable"));
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(flaws(&dir).state, State::Note);
    }
}
