-- What a worker's parent knows of its dead child: every job that it held goes back to the front of its queue at once,
-- and those that ran when the engine crashed are charged. Sent again, or too late, it charges nobody twice.
-- ARGV: P R worker iso, then id epoch nonce company alone(0|1) a job, the one to run first in front;
--   company: the most rows that may run unproven beside the job from now on, itself included; 0: it is not charged.
-- Returns {{id, outcome} …}; outcome: 'requeued', 'charged', 'dead', 'cancelled', 'expired', or 'gone' (another's by now).
local worker, iso = ARGV[3], ARGV[4]
local now = now_ms()
local done = {}

local function charge(id, c, company)
  local bound = tonumber(c.co or 0)
  if bound == 0 or company < bound then bound = company end
  -- `cr`, the attempt charged last, by its nonce, tells a resend; `su`: suspect since.
  redis.call('HSET', k_job(id), 'co', bound, 'cr', c.no, 'su', int(now))
  return redis.call('HINCRBY', k_job(id), 'at', 1)
end

local function settle(id, epoch, nonce, company, alone)
  local c = sound_fields(id)
  if not c then return 'gone' end
  for name, value in pairs(read_fields(id, 'ow', 'no', 'ca', 'cr')) do c[name] = value end
  if not is_attempt(c, epoch, nonce) then return 'gone' end
  local mine = runs(c, worker, epoch, nonce)
  -- Its lease ended before we came; nobody has claimed it since.
  local reaped = c.st == 'queued' and company > 0 and c.cr ~= nonce
  if not mine and not reaped then return 'gone' end
  if mine and c.ca and c.ca ~= '' then
    local state = state_for(c.ca)
    finalize_unowned(id, c.q, state, state == 'expired' and c.ca or 'cancelled', c.ca, iso, now)
    return state
  end
  local crashes = company > 0 and charge(id, c, company) or 0
  if mine and alone and crashes >= tonumber(c.ma) then
    finalize_unowned(id, c.q, 'dead', 'poison',
      'the job crashed the engine while it ran alone, after ' .. int(crashes) .. ' crashes in all', iso, now)
    return 'dead'
  end
  if mine then requeue(id, c.q, worker, c.ep) end
  return company > 0 and 'charged' or 'requeued'
end

-- Last first: each goes to the front.
for i = #ARGV - 4, 5, -5 do
  done[#done + 1] = {ARGV[i], settle(ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3]), ARGV[i + 4] == '1')}
end
return done
