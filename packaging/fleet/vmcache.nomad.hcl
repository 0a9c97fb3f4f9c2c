# A pool on each node, under Nomad's raw_exec: QEMUs outlive the task only where raw_exec does
# not end its cgroup's processes (no_cgroups), or with `cgroup` in the configuration. The
# package is installed on the nodes. Before the job is stopped for good: `vmcache drain` on
# each node. Not run under a real Nomad.
job "vmcache" {
  type        = "system"
  datacenters = ["*"]
  priority    = 90


  group "pool" {
    restart {
      attempts = 10
      interval = "1m"
      delay    = "1s"
      mode     = "delay"
    }

    task "serve" {
      driver = "raw_exec"

      config {
        command = "/usr/bin/vmcache"
        args    = ["serve", "--log", "stderr"]
      }

      # What systemd's RestartKillSignal is: VMs that stand ready are the next one's.
      kill_signal  = "SIGUSR1"
      kill_timeout = "90s"

      service {
        name     = "vmcache"
        provider = "nomad"

        check {
          name     = "ready"
          type     = "script"
          command  = "/usr/bin/vmcache"
          args     = ["status", "--check", "ready"]
          interval = "10s"
          timeout  = "5s"
        }
      }

      resources {
        cpu    = 100
        memory = 128
      }
    }
  }
}
