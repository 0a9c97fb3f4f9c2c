//! vmcache-security(7): what is promised to whom, each attacker, what stops it, and the test
//! that shows it.
//!
//! Invariant: a test that is named here is there (the test below looks).

use clap_mangen::roff::{bold, roman, Roff};

use super::manual::{head, item, paragraph, section, see_also};

/// An attacker.
struct Attacker {
    /// Who it is.
    name: &'static str,
    /// What it has.
    has: &'static str,
    /// What stops it.
    walls: &'static [&'static str],
    /// Tests of tests/attacks, by module and name.
    tests: &'static [&'static str],
}

const ATTACKERS: [Attacker; 5] = [
    Attacker {
        name: "A QEMU that a guest has taken over",
        has: "The guest is root in its VM, and has found a flaw in a device: it executes code as \
              QEMU, with all that QEMU has.",
        walls: &[
            "A user of its own for each VM, of a range that no other account, subordinate user or \
             container has.",
            "A filter of system calls before QEMU is executed, beside QEMU's own: no connect, no \
             bind, Unix stream sockets only, signals and limits of itself only, no ptrace, \
             process_vm, pidfd, keys, io_uring, io_setup, bpf, perf, userfaultfd, System V \
             objects and queues, mounts, namespaces, and no file's mode, owner, times, attributes or length \
             by its path.",
            "Landlock: it opens its libraries and what the configuration names.",
            "An empty network namespace; for a QEMU that is root also a mount namespace with its \
             own VM's directory.",
            "Sealed memory: nothing that VMs share can be written, mapped to be written, or \
             truncated, whoever holds it.",
            "No capability but to lock memory, no new privileges, a keyring of its own, no core \
             files, no environment, no open file but its own.",
            "A VM's directory is the server's alone, and its sockets are reached by nobody before \
             it is handed out.",
        ],
        tests: &[
            "qemu::as_packages_run_it_a_user_of_a_range",
            "qemu::as_root",
            "qemu::as_the_user_of_an_ordinary_users_server",
            "qemu::as_root_that_serves_files_by_9p",
            "qemu::without_walls_all_of_it_succeeds",
        ],
    },
    Attacker {
        name: "Another claimer",
        has: "A user who may claim has a VM of its own, and with it its QEMU's monitor.",
        walls: &[
            "All of the above: what its monitor makes QEMU do, QEMU may not.",
            "Its VM's directory it may pass through, and write nothing there; what it notes goes \
             through the server, bounded.",
            "What it asks the server of other VMs is refused by their owner.",
            "user_max_vms, user_max_memory, user_unconfirmed_per_minute; a limit of memory that \
             only the server raises (cgroup).",
        ],
        tests: &[
            "claimer::by_its_own_qemu_a_claimer_reaches_nothing",
            "claimer::by_its_own_processes_and_calls_a_claimer_reaches_nothing",
            "claimer::without_walls_its_qemu_reaches_all_of_it",
            "claimer::without_quotas_a_user_has_as_many_as_there_are",
        ],
    },
    Attacker {
        name: "A stranger",
        has: "A user who may connect to the server's socket, but not claim; one, or many users of \
              one person's.",
        walls: &[
            "Connections but root's and the server's own user's pass a relay before gRPC sees \
             them, which limits connections, streams, calls, resets, pings, settings, frames and \
             time, by connection and by user; who exceeds a limit is told which, and shut.",
            "Places of strangers and of claimers are apart; root's are not limited.",
            "Answers that are on their way are bounded, and lines of the log of one kind.",
        ],
        tests: &[
            "stranger::no_flood_of_strangers_takes_memory_or_time_from_others",
            "stranger::without_the_relay_each_flood_goes_too_far",
            "stranger::a_claimer_at_all_of_its_limits_takes_no_more_than_it_may",
            "stranger::a_stranger_is_never_taken_for_the_claimer_whose_number_it_has",
            "stranger::files_that_are_passed_hold_up_nobody",
            "stranger::who_is_shut_is_told_the_limit_and_the_log_has_a_line",
            "stranger::no_state_of_a_socket_keeps_the_relay_awake",
        ],
    },
    Attacker {
        name: "A hostile guest",
        has: "Its files, its agent's answers, its console, its silence.",
        walls: &[
            "vmcache cp makes files, directories and links, below the one name that was asked for, \
             of the caller's owner, with no set-id bits, capabilities or attributes; devices, \
             pipes and sockets are refused by name; --max-size, and the last 5 % of the target's \
             file system, bound it.",
            "Agents' answers are bounded in size and time; a guest that does not answer ends the \
             command that waits for it.",
            "What is printed or logged of it commands no terminal; the output of a command that \
             runs in it is passed on as it is.",
        ],
        tests: &[
            "guest::what_is_copied_out_of_a_guest_is_files_directories_and_links",
            "guest::texts_of_a_guest_command_no_terminal",
            "guest::a_guest_that_answers_nothing_holds_nobody",
        ],
    },
    Attacker {
        name: "The other owner of a path",
        has: "A local user who owns, or may write, a path that the server or root's command uses, \
              or a directory above it.",
        walls: &[
            "Every component of every configured path is root's or the server's user's and not \
             writable for others, or the path is refused by that component's name.",
            "What was checked is what is opened; what is written follows no link.",
        ],
        tests: &[
            "paths::every_path_of_a_configuration_and_what_is_above_it_is_refused_by_name",
            "paths::a_configuration_that_is_swapped_is_never_another_users",
            "paths::a_store_that_is_swapped_has_nothing_of_roots_removed",
            "paths::a_lock_that_is_a_link_empties_nobodys_file",
        ],
    },
];

/// What is no part of the promise.
const LIMITS: [(&str, &str); 7] = [
    (
        "TCG",
        "QEMU's policy gives guests that are translated (accel = \"tcg\") no isolation: flaws in \
         its devices and translator are no security flaws to it. The walls around QEMU stand \
         under TCG, too; they are then the only ones.",
    ),
    (
        "9p",
        "shared_fs = \"virtio-9p\" is for guests that are trusted: QEMU is root, and gives files \
         of the shared directory the owners and modes that the guest's root asks for. It makes no \
         device files, and sees no other directory of the host.",
    ),
    (
        "virtio-fs",
        "shared_fs = \"virtio-fs\" has a virtiofsd as root, which confines itself. A directory of \
         run --rootfs is read-only for it; a VM's own shared directory is a small file system in \
         memory, without devices and programs. It goes to nobody but root.",
    ),
    (
        "The host's kernel",
        "KVM, vhost and virtio's back ends are code of the kernel that a guest reaches. doctor \
         reports what the kernel says of its processor's flaws, and cannot know what nobody has \
         reported.",
    ),
    (
        "Templates",
        "Clones share pages that none of them has written, so one guest can measure which another \
         has touched: no templates between tenants who must learn nothing of each other.",
    ),
    (
        "vsock",
        "Any user of the host can connect to a guest's vsock port and run commands there; the \
         kernel has no remedy. Serial ports, the default, are the claimer's alone.",
    ),
    (
        "The network in user space",
        "--net user gives the guest what an ordinary program of this host reaches; by QEMU's \
         network code, services on 127.0.0.1, too. by=passt leaves these out; \
         Debian 12's (of March 2023) can lose the end of a TCP connection that both sides \
         close in one moment.",
    ),
];

/// The page.
pub fn page() -> String {
    let mut page = Roff::default();
    head(
        &mut page,
        "VMCACHE-SECURITY",
        "7",
        "vmcache-security - who is kept from what, and by what",
    );
    section(&mut page, "DESCRIPTION");
    page.text([roman(
        "A guest is hostile from the moment at which it runs a user's command. It must not reach \
         the host, another VM, a template, or the server; a user who has a VM must not reach \
         another's; one who has none must not take the server's memory or time from others; and \
         nobody but root and the server's user decides what the server runs and writes. Root, the \
         server's user, its QEMU, kernel and initramfs are trusted.",
    )]);
    paragraph(&mut page, [roman(
        "vmcache status, vmcache doctor and the measure vmcache_isolation_info say how far guests \
         are isolated: vm (by the processor, and the walls below), weak (an option or this host \
         takes a wall away; which), or none (TCG).",
    )]);
    section(&mut page, "ATTACKERS");
    page.text([roman(
        "Each is a group of tests that runs on real VMs, and once more with its walls taken down, \
         when it must succeed: in the source, tests/attacks.",
    )]);
    for attacker in &ATTACKERS {
        page.control("SS", [attacker.name]);
        page.text([roman(attacker.has)]);
        for wall in attacker.walls {
            page.control("IP", ["\\(bu", "2"]);
            page.text([roman(*wall)]);
        }
        // Names cannot be broken into lines of one length.
        page.control("ad", ["l"]);
        paragraph(&mut page, [bold("Shown by "), roman(attacker.tests.join(", "))]);
        page.control("ad", ["b"]);
    }
    section(&mut page, "LIMITS");
    for (what, why) in LIMITS {
        item(&mut page, what, why);
    }
    section(&mut page, "WHERE THEY ARE SET");
    page.text([roman(
        "vmcache.toml(5): user, confine, confine_paths, sandbox, cgroup, apparmor_profile, \
         selinux_label, nested, kata_calls, claim_users, claim_groups, socket_mode, \
         socket_group, user_max_vms, user_max_memory, user_unconfirmed_per_minute, \
         lift_memory_limit, user_max_connections, max_connections, stranger_max_connections, \
         strangers_max_connections, stranger_max_streams.",
    )]);
    see_also(&mut page);
    page.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_that_are_named_are_there() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/attacks");
        for test in ATTACKERS.iter().flat_map(|a| a.tests) {
            let (module, name) = test.split_once("::").unwrap();
            let text = std::fs::read_to_string(root.join(format!("{module}.rs"))).unwrap();
            assert!(text.contains(&format!("#[test]\nfn {name}()")), "{test}");
        }
    }

    #[test]
    fn options_that_are_named_are_there() {
        let page = page();
        let list = page.split("vmcache.toml(5): ").nth(1).unwrap();
        let names = list.split('.').next().unwrap().replace('\n', " ");
        for name in names.split(", ").map(|n| n.trim().replace("\\-", "-")) {
            let known = crate::config::options::find(crate::config::options::OURS, &name);
            assert!(known.is_some(), "{name}");
        }
    }
}
