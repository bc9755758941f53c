-- What a worker's parent knows of its dead child: every job that it held goes back to the front of its queue at once,
-- and those that ran when the engine crashed are charged. Sent again, or too late, it charges nobody twice.
-- ARGV: two prefixes, worker, iso (the wall clock's time in RQ's form), then for each job, the one to run first in front:
--   id, epoch, nonce                  the attempt
--   max_unproven                      the most unproven rows that may run with the job from now on, itself included; 0: not charged
--   alone (0|1)                       whether it ran alone
-- Returns for each job: id, outcome (requeued | charged | dead | cancelled | expired, or gone: another's by now).
local worker, iso = ARGV[3], ARGV[4]
local FIRST_JOB, ARGUMENTS = 5, 5
local READ = field_list('owner', 'nonce', 'cancel_reason', 'charged_nonce')
local now = now_ms()
local done = {}

local function charge(id, job, max_unproven)
  local bound = tonumber(job.max_unproven or 0)
  if bound == 0 or max_unproven < bound then bound = max_unproven end
  -- `charged_nonce` tells a resend.
  set_fields(id, {max_unproven = bound, charged_nonce = job.nonce, suspect_since_ms = int(now)})
  return redis.call('HINCRBY', k_job(id), F.crashes, 1)
end

local function settle(id, epoch, nonce, max_unproven, alone)
  local job = read_sound(id)
  if not job then return 'gone' end
  LOSSES.forgive(id, nonce)  -- its parent is there
  for name, value in pairs(find_fields(id, READ)) do job[name] = value end
  if not is_attempt(job, epoch, nonce) then return 'gone' end
  local mine, charged = runs(job, worker, epoch, nonce), max_unproven > 0
  -- Its lease ended before we came; nobody has claimed it since.
  local reaped = job.state == 'queued' and charged and job.charged_nonce ~= nonce
  if not mine and not reaped then return 'gone' end
  local ended = mine and end_cancelled(id, job, iso, now)
  if ended then return ended end
  local crashes = charged and charge(id, job, max_unproven) or 0
  if mine and alone and crashes >= tonumber(job.max_attempts) then
    finalize_unowned(id, job.queue, 'dead', 'poison',
      'the job crashed the engine while it ran alone, after ' .. int(crashes) .. ' crashes in all', iso, now)
    return 'dead'
  end
  if mine then requeue(id, job.queue, worker, job.epoch) end
  return charged and 'charged' or 'requeued'
end

-- Last first: each goes to the front.
for at = #ARGV - ARGUMENTS + 1, FIRST_JOB, -ARGUMENTS do
  local id, epoch, nonce, max_unproven, alone = unpack(ARGV, at, at + ARGUMENTS - 1)
  done[#done + 1] = {id, settle(id, epoch, nonce, tonumber(max_unproven), alone == '1')}
end
return answer(done)
